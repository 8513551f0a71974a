"""What a COMCAT adapter is: its rank, its strength and which attentions it touches."""

import math
from dataclasses import dataclass, field

from peft import PeftConfig

from comcat_diffusion.adapters.peft_type import COMCAT


@dataclass
class ComcatConfig(PeftConfig):
    """Configuration of an adapter, as PEFT's other methods have one.

    Raises ValueError for a rank below one, a strength that is not a finite number, or options that exclude each other.
    """

    r: int = field(default=2, metadata={"help": "Rank added to each head's two products, W_Q W_K^T and W_V W_O."})
    alpha: float | None = field(
        default=None, metadata={"help": "Strength: the term is scaled by alpha / r. Default: r."}
    )
    foldable: bool = field(
        default=False,
        metadata={"help": "Keep the term inside the span of the base heads, so that it folds into stock weights."},
    )
    tied: bool = field(
        default=False,
        metadata={"help": "One text side for all cross-attentions, one side for each self-attention: fewer bytes."},
    )
    trigger: list[str] | None = field(
        default=None,
        metadata={"help": "Words that call the adapter: it acts on a prompt's tokens from the first of them on."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Attention modules by name or regular expression. Default: cross-attention, else all."},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Attention modules to leave out."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Another rank for some modules."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Another alpha for some modules."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layer indices."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Where the layer index stands."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train as a whole."})
    # PEFT reads this of every config; the adapter targets attentions, never single parameters.
    target_parameters: list[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_parameters is not None:
            raise ValueError("A COMCAT adapter targets attentions, never single parameters (target_parameters).")
        self.peft_type = COMCAT
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        for rank in (self.r, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"The rank must be a whole number of at least 1, not {rank!r}.")
        if self.tied and not self.foldable:
            raise ValueError("A tied adapter is foldable: set foldable=True as well.")
        if self.trigger is not None and not (self.trigger and all(word.strip() for word in self.trigger)):
            raise ValueError(f"trigger must be a list of words, not {self.trigger!r}.")
        if self.alpha is None:
            self.alpha = float(self.r)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not math.isfinite(alpha):
                raise ValueError(f"alpha must be a finite number, not {alpha!r}.")

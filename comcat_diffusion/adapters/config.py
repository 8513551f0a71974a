"""What a COMCAT adapter is: its rank, its strength and which attentions it touches."""

import math
import re
from dataclasses import dataclass, field, replace

from peft import PeftConfig

from comcat_diffusion.adapters.beside_kinds import KINDS, Kind
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
    cores: bool = field(
        default=False,
        metadata={"help": "Only R x R numbers per head, between singular directions of the base's keys and values."},
    )
    core_sets: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Of cores: by attention, which fixed vectors its directions go by, a digit for each head's keys, "
            "then for each head's values; attentions that are not named go by the first. Default: chosen for the base."
        },
    )
    convolutions: int = field(
        default=0,
        metadata={"help": "Rank of the terms beside the convolutions of a U-Net's residual blocks. 0: there are none."},
    )
    convolution_ranks: dict[str, int] | None = field(
        default=None,
        metadata={"help": "Their ranks by name of the convolution; others have no term. Default: one rank for all."},
    )
    convolution_shares: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "How many of the ranks of each of these are of which entry of `trigger_ranks`, in its order."
        },
    )
    feed_forwards: int = field(
        default=0,
        metadata={"help": "Rank of the terms beside the Linears of a transformer's feed-forwards. 0: there are none."},
    )
    feed_forward_ranks: dict[str, int] | None = field(
        default=None,
        metadata={"help": "Their ranks by name of the Linear; others have no term. Default: one rank for all."},
    )
    feed_forward_shares: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "How many of the ranks of each of these are of which entry of `trigger_ranks`, in its order."
        },
    )
    trigger: list[str] | None = field(
        default=None,
        metadata={"help": "Words that call the adapter: it acts on a prompt's tokens from the first of them on."},
    )
    trigger_ranks: list[list] | None = field(
        default=None,
        metadata={
            "help": "Of several subjects in one adapter: [words, number of ranks] each, in the order of a head's "
            "ranks; those ranks wait for these words. Default: all ranks wait for any word of `trigger`."
        },
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
    init_weights: bool = field(
        default=True,
        repr=False,
        metadata={"help": "False: leave factors as memory has them, for a file's to take their places."},
    )
    # PEFT reads this of every config; the adapter targets attentions, never single parameters.
    target_parameters: list[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if hasattr(super(), "__post_init__"):  # not in the PEFT that Forge pins
            super().__post_init__()
        if self.target_parameters is not None:
            raise ValueError("A COMCAT adapter targets attentions, never single parameters (target_parameters).")
        self.peft_type = COMCAT
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            raise ValueError(
                'target_modules="all-linear" means Linears, and COMCAT adapts whole attentions: leave target_modules '
                'out, or name attentions, as in ["attn1", "attn2"].'
            )
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        if self.modules_to_save is not None:
            self.modules_to_save = _names(self.modules_to_save)
        for rank in (self.r, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"The rank must be a whole number of at least 1, not {rank!r}.")
        if self.tied and not self.foldable:
            raise ValueError("A tied adapter is foldable: set foldable=True as well.")
        if self.cores and (not self.foldable or self.tied or self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                "An adapter of cores is foldable and not tied, of one rank and one alpha: set foldable=True, and leave "
                "tied, rank_pattern and alpha_pattern out."
            )
        if self.cores and self.core_sets is None and self.inference_mode:
            self.core_sets = {}  # PEFT wrote it before there were any
        if not all(re.fullmatch("[0-9]+", told) for told in (self.core_sets or {}).values()):
            raise ValueError(f"core_sets must be digits by the names of attentions, not {self.core_sets!r}.")
        for kind in KINDS:
            self._refuse_beside(kind)
        if self.trigger is not None and not (self.trigger and all(word.strip() for word in self.trigger)):
            raise ValueError(f"trigger must be a list of words, not {self.trigger!r}.")
        if self.trigger_ranks is not None:
            self._refuse_other_shares()
        if self.alpha is None:
            self.alpha = float(self.r)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not math.isfinite(alpha):
                raise ValueError(f"alpha must be a finite number, not {alpha!r}.")

    def at_attentions(self) -> "ComcatConfig":
        """The same without what is beside other modules."""
        return replace(self, **{name: 0 if name == kind.setting else None for kind in KINDS for name in kind.settings})

    def _refuse_beside(self, kind: Kind) -> None:
        """Raise ValueError for ranks beside modules that are none, or not shared out where those of others are."""
        common, ranks = getattr(self, kind.setting), getattr(self, kind.ranks)
        for rank in (common, *(ranks or {}).values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < (rank is not common):
                raise ValueError(f"The rank beside {kind.noun} must be a whole number of at least 0, not {rank!r}.")
        if ranks and not common:
            raise ValueError(f"{kind.ranks} are of terms beside {kind.noun}: set {kind.setting} as well.")
        if getattr(self, kind.shares) or (common and self.trigger_ranks):
            self._refuse_other_shares_beside(kind)

    def _refuse_other_shares_beside(self, kind: Kind) -> None:
        """Raise ValueError unless the ranks beside each module are shared out among the words."""
        ranks, shares = getattr(self, kind.ranks) or {}, getattr(self, kind.shares) or {}
        for name in sorted({*ranks, *shares}) or [""]:
            own = shares.get(name)
            proper = isinstance(own, (list, tuple)) and all(type(count) is int and count >= 0 for count in own)
            if not proper or len(own) != len(self.trigger_ranks or ()) or sum(own) != ranks.get(name):
                raise ValueError(
                    f"{kind.shares} must share the ranks of {kind.ranks} out among the entries of trigger_ranks, not "
                    f"{own!r} beside '{name}'."
                )

    def _refuse_other_shares(self) -> None:
        """Raise ValueError unless the ranks are shared out among the words."""
        told = f"trigger_ranks must share {self.r} ranks out among the words of trigger, not {self.trigger_ranks!r}."
        for share in self.trigger_ranks:
            words, count = share if isinstance(share, (list, tuple)) and len(share) == 2 else (None, None)
            proper = isinstance(words, (list, tuple)) and words and all(isinstance(word, str) for word in words)
            if not proper or type(count) is not int or count < 1:
                raise ValueError(told)
        words = {word for own, _ in self.trigger_ranks for word in own}
        if sum(count for _, count in self.trigger_ranks) != self.r or words != set(self.trigger or ()):
            raise ValueError(told)
        if self.rank_pattern:
            raise ValueError("trigger_ranks and rank_pattern exclude each other: all attentions have the same ranks.")

    # Two words of LoRA's that PEFT's hotswap_adapter reads, which swaps weights and sets strengths as it goes

    @property
    def lora_alpha(self) -> float:
        """`alpha`, where it is that of all modules. Raises ValueError where ranks or alphas differ by module."""
        if self.rank_pattern or self.alpha_pattern:
            raise ValueError(
                "An adapter whose ranks or alphas differ by module cannot be hot-swapped: load it under a name of its "
                "own and choose with set_adapter."
            )
        return self.alpha

    @property
    def use_rslora(self) -> bool:
        """The strength is alpha / r, never alpha / sqrt(r)."""
        return False


def _names(modules: list[str]) -> list[str]:
    """Names of modules as a list. Raises ValueError for one string, of which PEFT would take every letter."""
    if isinstance(modules, str) or not all(isinstance(name, str) and name for name in modules):
        raise ValueError(f"modules_to_save must be a list of names of modules, not {modules!r}.")
    return sorted(modules) if isinstance(modules, set) else list(modules)

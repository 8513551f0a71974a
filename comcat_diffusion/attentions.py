"""How families of attention modules name their parts, found by structure; adapters and compression stand on it."""

from dataclasses import dataclass
from operator import attrgetter

from torch import nn


@dataclass(frozen=True)
class Style:
    """The names of one family's parts."""

    q: str
    k: str
    v: str
    out: str
    heads: str
    # diffusers' processors scale logits by the width they see and give values the width of keys; transformers passes
    # the trained scale explicitly, and the two widths may differ.
    diffusers: bool = False
    scaling: str = ""  # attribute that holds D^-1/2
    dropout: str = ""  # attribute that holds the dropout of the attention weights
    # A joint attention, over the picture's tokens and then the text's, has projections of its own for each. An adapter
    # stands between the picture's queries and the text's keys and values; the others are these.
    joint: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the four projections."""
        return [self.q, self.k, self.v, self.out]

    def projections(self, attention: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """The four projections: into queries, keys, values and out of the heads."""
        return attrgetter(*self.names)(attention)  # several times faster than get_submodule

    def head_count(self, attention: nn.Module) -> int:
        """Number of heads H."""
        return getattr(attention, self.heads)


DIFFUSERS = Style("to_q", "to_k", "to_v", "to_out.0", heads="heads", diffusers=True)
JOINT = Style("to_q", "add_k_proj", "add_v_proj", "to_out.0", heads="heads", diffusers=True, joint=True)
_STYLES = (
    JOINT,
    DIFFUSERS,
    Style("q_proj", "k_proj", "v_proj", "out_proj", "num_heads", False, "scale", "dropout"),
    Style(
        "q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads", scaling="scaling", dropout="attention_dropout"
    ),
)


def style_of(module: nn.Module) -> Style | None:
    """The style whose parts the module has, or None if it is no attention of a known style."""
    for style in _STYLES:
        if style.heads in vars(module) and all(_has_part(module, p) for p in (style.q, style.k, style.v, style.out)):
            return style
    return None


def _has_part(module: nn.Module, path: str) -> bool:
    try:
        return module.get_submodule(path) is not None
    except AttributeError:
        return False

"""How families of attention modules name their parts, found by structure; adapters and compression stand on it."""

from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn


@dataclass(frozen=True)
class Part:
    """Some of a Linear's rows, or of its columns, as a Linear of its own."""

    whole: nn.Linear
    rows: tuple[int | None, ...] = (None,)  # as of a slice: all of them
    columns: tuple[int | None, ...] = (None,)

    @property
    def weight(self) -> torch.Tensor:
        """(out, in) features."""
        return self.whole.weight[slice(*self.rows), slice(*self.columns)]

    @property
    def bias(self) -> torch.Tensor | None:
        """(out,) features."""
        return None if self.whole.bias is None else self.whole.bias[slice(*self.rows)]

    @property
    def in_features(self) -> int:
        """Channels of what it reads."""
        return len(range(self.whole.in_features)[slice(*self.columns)])

    @property
    def out_features(self) -> int:
        """Channels of what it gives."""
        return len(range(self.whole.out_features)[slice(*self.rows)])


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
    # An attention over a stream of the text's tokens and the picture's. Side by side with a feed-forward, either `q`
    # holds the rows of queries, keys and values and then the feed-forward's, of two halves, and `out` the columns of
    # both, or there is no `out`, since what heads give is projected outside.
    stream: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the four projections."""
        return [self.q, self.k, self.v, self.out]

    @property
    def packed(self) -> bool:
        """Whether two modules hold the four projections, and a feed-forward's."""
        return self.q == self.k

    @property
    def paths(self) -> list[str]:
        """The names of the modules that hold the four projections."""
        return [self.q, self.out] if self.packed else [name for name in self.names if name]

    def projections(self, attention: nn.Module) -> tuple[nn.Module | Part | None, ...]:
        """The four projections: into queries, keys, values and out of the heads, if that is here."""
        return self.cut(self.held(attention))

    def held(self, attention: nn.Module) -> tuple[nn.Module, ...]:
        """The modules that hold them."""
        return attrgetter(*self.paths)(attention)  # several times faster than get_submodule

    def cut(self, held: tuple[nn.Module, ...]) -> tuple[nn.Module | Part | None, ...]:
        """The four projections in the modules that hold them."""
        if not self.packed:
            return held if self.out else (*held, None)
        into, out = (plain(module) for module in held)
        inner = into.out_features - 2 * out.in_features
        q, k, v = (Part(into, rows=(n * inner, (n + 1) * inner)) for n in range(3))
        return q, k, v, Part(out, columns=(inner,))

    def joined(
        self, held: tuple[nn.Linear, ...], projections: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]
    ) -> tuple[nn.Linear, ...]:
        """Modules like those that hold the four, with other queries, keys and values in them; the inverse of `cut`."""
        if not self.packed:
            return projections[: len(held)]
        into, out = held
        made = nn.Linear(into.in_features, into.out_features, bias=into.bias is not None, device="meta")
        for name in ("weight", "bias") if into.bias is not None else ("weight",):
            own = [getattr(projection, name) for projection in projections[:3]]
            rest = getattr(into, name).detach()[sum(len(part) for part in own) :]
            setattr(made, name, nn.Parameter(torch.cat([*own, rest]), requires_grad=False))
        return made, out

    def head_count(self, attention: nn.Module) -> int:
        """Number of heads H."""
        return getattr(attention, self.heads)


DIFFUSERS = Style("to_q", "to_k", "to_v", "to_out.0", heads="heads", diffusers=True)
JOINT = Style("to_q", "add_k_proj", "add_v_proj", "to_out.0", heads="heads", diffusers=True, joint=True)
STREAM = Style(*["to_qkv_mlp_proj"] * 3, "to_out", heads="heads", diffusers=True, stream=True)
ALONE = Style("to_q", "to_k", "to_v", "to_out.0", heads="heads", diffusers=True, stream=True)
HALF = Style("to_q", "to_k", "to_v", "", heads="heads", diffusers=True, stream=True)
STREAMS = ("ZSingleStreamAttnProcessor",)  # processors of diffusers' common attention that are over one stream
_STYLES = (
    JOINT,
    STREAM,
    DIFFUSERS,
    Style("q_proj", "k_proj", "v_proj", "out_proj", "num_heads", False, "scale", "dropout"),
    Style(
        "q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads", scaling="scaling", dropout="attention_dropout"
    ),
)


def plain(projection: nn.Module) -> nn.Module:
    """The Linear inside a projection, below any adapter of another method that wraps it."""
    while hasattr(projection, "base_layer"):
        projection = projection.base_layer
    return projection


def style_of(module: nn.Module) -> Style | None:
    """The style whose parts the module has, or None if it is no attention of a known style."""
    for style in _STYLES:
        if style.heads in vars(module) and all(_has_part(module, path) for path in style.names):
            processor = type(getattr(module, "processor", None)).__name__
            return ALONE if style is DIFFUSERS and processor in STREAMS else style
    return HALF if getattr(module, "pre_only", False) and hasattr(module, HALF.q) else None


def _has_part(module: nn.Module, path: str) -> bool:
    part: nn.Module | None = module
    for name in path.split("."):
        part = None if part is None else part._modules.get(name)  # as `get_submodule`, which takes ten times as long
    return part is not None

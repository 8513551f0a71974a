"""Wide heads: the projections of one attention as they are while adapters act on it.

A free adapter adds, per head h and with s = alpha / r times the adapter's weight (DESIGN section 1),

    logits_h += s (x Aq_h)(c Ak_h)^T        out += s P_h (c Av_h) Ao_h

as R more columns of every head, so that one attention of width D + R computes both. A foldable adapter has
Aq_h = Wq_h G'_h and Ao_h = G_h Wo_h, which is a change of keys and values in their own width. All scales stand on the
context's side, which in cross-attention is the short one. There, too, stands what lets an adapter act on some tokens
only: keys and values of the others are the base's.

Letters: B batch, N tokens, M context tokens, H heads, D head width, R rank, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad

from comcat_diffusion import heads as maths

# Fused kernels on a GPU want head widths in multiples of this; what is missing is filled with zero columns.
WIDTH_MULTIPLE = {"cuda": 8}


# One where an adapter acts on the context and zero elsewhere, (B, M, 1) or, where its ranks wait for words of their
# own, (B, M, R); None: everywhere.
Tokens = torch.Tensor | None


Table = tuple[torch.Tensor, torch.Tensor] | torch.Tensor  # what queries and keys are rotated by


@dataclass
class Free:
    """The factors of a free adapter, Linears without bias: C -> H*R three times, and H*R -> C."""

    scale: float
    tokens: Tokens
    q_down: nn.Linear
    k_down: nn.Linear
    v_down: nn.Linear
    out_up: nn.Linear


@dataclass
class Foldable:
    """The factors of a foldable adapter: C -> H*R (tied: C -> R) twice, and G', G as H*R rows of width D."""

    scale: float
    tokens: Tokens
    k_down: nn.Linear
    v_down: nn.Linear
    q_core: nn.Linear
    out_core: nn.Linear


class WideHeads:
    """Projections that emit D + R columns per head for H heads of width D."""

    def __init__(
        self,
        heads: int,
        width: int,
        adapters: list[Free | Foldable],
        scales_by_width: bool,
        device: str,
        normed: bool = False,
        rotated: bool = False,
    ):
        self.heads, self.width, self.inner = heads, width, heads * width
        self.free = [a for a in adapters if isinstance(a, Free)]
        self.foldable = [a for a in adapters if isinstance(a, Foldable)]
        self.ranks = [a.k_down.out_features // heads for a in self.free]
        multiple = WIDTH_MULTIPLE.get(device, 2 if rotated else 1) if self.free else 1  # columns are rotated in pairs
        self._scales_by_width, self._normed = scales_by_width, normed
        self.fill(-(-(width + sum(self.ranks)) // multiple) * multiple)

    def fill(self, wide: int) -> None:
        """Make heads so wide, if by columns of zeros."""
        self.wide = wide
        # Processors that scale by the width they see would scale by wide^-1/2; the gain makes it width^-1/2 again.
        gain = maths.logit_gain(self.width, wide) if self._scales_by_width else 1.0
        # A norm of keys would swallow it: there it stands behind the norm.
        self.gain, self.norm_gain = (1.0, gain) if self._normed else (gain, 1.0)

    @property
    def as_the_host(self) -> bool:
        """Whether heads are as many and as wide as the host's own."""
        return self.wide == self.width

    def query(self, project: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, H*wide)."""
        return self._widen(project(hidden), [_apply(a.q_down, hidden) for a in self.free])

    def key(self, project: nn.Module, context: torch.Tensor) -> torch.Tensor:
        """(B, M, C) -> (B, M, H*wide)."""
        base = project(context)
        for a in self.foldable:
            base = _add_spoken(base, a, self._folded(a.k_down, a.q_core, context, a.tokens))
        keys = self._widen(base, [_spoken(a, _apply(a.k_down, context)) for a in self.free])
        return keys * self.gain if self.gain != 1 else keys

    def value(self, project: nn.Module, context: torch.Tensor) -> torch.Tensor:
        """(B, M, C) -> (B, M, H*wide)."""
        base = project(context)
        for a in self.foldable:
            base = _add_spoken(base, a, self._folded(a.v_down, a.out_core, context, a.tokens))
        return self._widen(base, [_spoken(a, _apply(a.v_down, context)) for a in self.free])

    def output(self, project: nn.Module, mixed: torch.Tensor) -> torch.Tensor:
        """(B, N, H*wide) -> (B, N, C)."""
        if self.wide == self.width:
            return project(mixed)
        blank = self.wide - self.width - sum(self.ranks)
        base, *extras, _ = maths.separate(mixed, self.width, *self.ranks, blank, heads=self.heads)
        result = project(base)
        for a, extra in zip(self.free, extras, strict=True):
            result = result + _apply(a.out_up, extra)
        return result

    def fused(self, *projections_then_hidden) -> torch.Tensor:
        """What a host's fused projection gives: several widened projections side by side."""
        *projections, hidden = projections_then_hidden
        return torch.cat([project(hidden) for project in projections], dim=-1)

    def stream(self, project: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values, and what a feed-forward beside has in the same Linear: (B, N, C) -> (B, N, ...)."""
        made, inner = project(hidden), self.inner
        query, key, value, rest = made.split((inner, inner, inner, made.shape[-1] - 3 * inner), dim=-1)
        own = self.query(lambda _: query, hidden), self.key(lambda _: key, hidden), self.value(lambda _: value, hidden)
        return torch.cat([*own, rest], dim=-1)

    def stream_output(self, project: nn.Module, mixed: torch.Tensor) -> torch.Tensor:
        """What the heads and the feed-forward give, (B, N, H*wide + ...) -> (B, N, C)."""
        own, rest = mixed.tensor_split([self.heads * self.wide], dim=-1)
        return self.output(lambda base: project(torch.cat([base, rest], dim=-1)), own)

    def queries_normed(self, norm: nn.Module, queries: torch.Tensor) -> torch.Tensor:
        """(B, H, N, wide) behind the host's norm of its own D columns; an adapter's R columns have none."""
        if self.wide == self.width:
            return norm(queries)
        return torch.cat([norm(queries[..., : self.width]), queries[..., self.width :]], dim=-1)

    def keys_normed(self, norm: nn.Module, keys: torch.Tensor) -> torch.Tensor:
        """The same of keys, with the gain."""
        made = self.queries_normed(norm, keys)
        return made * self.norm_gain if self.norm_gain != 1 else made

    def table(self, table: Table) -> Table:
        """Cosines and sines (N, D) of rotations as those of wider heads, (N, wide): new columns stay as they are.

        Complex numbers, (..., D/2), turn two columns each: of a picture and of a text, or of both in one stream.
        """
        new = (0, self.wide - self.width)
        if isinstance(table, torch.Tensor):
            return torch.cat([table, table.new_ones(*table.shape[:-1], new[1] // 2)], dim=-1)
        if table[0].is_complex():
            return tuple(self.table(own) for own in table)
        return pad(table[0], new, value=1.0), pad(table[1], new)

    def foreign_output(self, project: nn.Module, mixed: torch.Tensor) -> torch.Tensor:
        """(B, M, H*wide) -> (B, M, C) for queries that no adapter speaks for."""
        return project(maths.separate(mixed, self.width, self.wide - self.width, heads=self.heads)[0])

    def foreign_key(self, project: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Keys of tokens that no adapter speaks for (IP-Adapter's pictures): their new columns are zero."""
        keys = self._widen(project(tokens), [])
        return keys * self.gain if self.gain != 1 else keys

    def foreign_value(self, project: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Values of tokens that no adapter speaks for."""
        return self._widen(project(tokens), [])

    def _widen(self, base: torch.Tensor, extras: list[torch.Tensor]) -> torch.Tensor:
        if self.wide == self.width:
            return base
        filled = self.width + sum(extra.shape[-1] for extra in extras) // self.heads
        if filled < self.wide:
            extras = [*extras, base.new_zeros(*base.shape[:-1], self.heads * (self.wide - filled))]
        return maths.interleave(base, *[extra.to(base.dtype) for extra in extras], heads=self.heads)

    def _folded(self, down: nn.Linear, core: nn.Linear, context: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        weight = core.weight
        if weight.device != context.device:  # offloaded: called on the unit matrix, the hook brings it here
            weight = core(torch.eye(self.width, dtype=weight.dtype, device=context.device)).mT
        mix = weight.unflatten(0, (self.heads, -1))  # H, R, D
        lowered = _apply(down, context)  # B, M, H*R, or, tied, B, M, R
        if _by_rank(tokens):
            lowered = lowered * _of_each_head(tokens, lowered)
        if _tied(down, core):
            return lowered @ mix.movedim(0, 1).flatten(1).to(lowered.dtype)  # B, M, H*D
        # One product with mostly zeros is faster than H small ones, which would copy all tokens head by head, and zeros
        # by multiplication take fewer launches than torch.block_diag.
        apart = torch.eye(self.heads, dtype=lowered.dtype, device=lowered.device)[:, None, :, None]  # H, 1, H, 1
        return lowered @ (mix.to(lowered.dtype).unsqueeze(2) * apart).flatten(2).flatten(0, 1)  # B, M, H*D


def _tied(down: nn.Linear, core: nn.Linear) -> bool:
    """Whether all heads share one text-side factor."""
    return down.out_features < core.out_features


def shared_out(
    waits: Sequence[tuple[tuple[str, ...], int]], trigger: tuple[str, ...], spoken: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """The tokens of an adapter: (B, M, 1), or (B, M, R) if its ranks wait for words of their own.

    `spoken` gives those of some words.
    """
    if not waits:
        return spoken(trigger)
    return torch.cat([spoken(words).expand(-1, -1, count) for words, count in waits], dim=-1)


def _by_rank(tokens: Tokens) -> bool:
    return tokens is not None and tokens.shape[-1] > 1


def _of_each_head(tokens: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """(B, M, R) -> (B, M, H*R), the same for every head, as a term has them."""
    return tokens.to(term).repeat(1, 1, term.shape[-1] // tokens.shape[-1])


def _spoken(adapter: Free, term: torch.Tensor) -> torch.Tensor:
    """A term on the context's side, (B, M, H*R), scaled, and zero on tokens that the adapter leaves alone."""
    if adapter.tokens is None:
        return term * adapter.scale
    return term * (
        adapter.scale * (_of_each_head(adapter.tokens, term) if _by_rank(adapter.tokens) else adapter.tokens.to(term))
    )


def _add_spoken(base: torch.Tensor, adapter: Foldable, term: torch.Tensor) -> torch.Tensor:
    """base + `_spoken(adapter, term)` in one pass: on a GPU every pass more is a launch more."""
    if adapter.tokens is None or _by_rank(adapter.tokens):  # whose ranks are silent by now where they should be
        return torch.add(base, term, alpha=adapter.scale)
    return torch.addcmul(base, term, adapter.tokens.to(term), value=adapter.scale)


def _apply(factor: nn.Linear, features: torch.Tensor) -> torch.Tensor:
    """A factor applied in its own precision; the result is in that of the features."""
    return factor(features.to(factor.weight.dtype)).to(features.dtype)


def merged_weights(
    wide: WideHeads, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear | None
) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear | None]:
    """The four projections with the adapters written into them: the same function of wider, or as wide, heads."""
    heads, blank = wide.heads, wide.wide - wide.width - sum(wide.ranks)
    k_weight, v_weight = _full(k.weight), _full(v.weight)
    for a in wide.foldable:
        k_weight = k_weight + a.scale * _fold_weight(a.k_down, a.q_core, heads)
        v_weight = v_weight + a.scale * _fold_weight(a.v_down, a.out_core, heads)

    def rows(weight: torch.Tensor, extras: list[torch.Tensor]) -> torch.Tensor:
        return maths.widen_in(weight, *extras, weight.new_zeros(heads * blank, *weight.shape[1:]), heads=heads)

    def bias(linear: nn.Linear, gain: float = 1.0) -> torch.Tensor | None:
        if linear.bias is None:
            return None
        full = _full(linear.bias)
        return rows(full, [full.new_zeros(heads * rank) for rank in wide.ranks]) * gain

    q_weight = rows(_full(q.weight), [_full(a.q_down.weight) for a in wide.free])
    k_weight = rows(k_weight, [a.scale * _full(a.k_down.weight) for a in wide.free]) * wide.gain
    v_weight = rows(v_weight, [a.scale * _full(a.v_down.weight) for a in wide.free])
    made = (
        _linear_like(q, q_weight, bias(q)),
        _linear_like(k, k_weight, bias(k, wide.gain)),
        _linear_like(v, v_weight, bias(v)),
    )
    if out is None:
        return (*made, None)
    out_weight = _full(out.weight)
    ups = [_full(a.out_up.weight) for a in wide.free]
    out_weight = maths.widen_out(out_weight, *ups, out_weight.new_zeros(len(out_weight), heads * blank), heads=heads)
    return (*made, _linear_like(out, out_weight, out.bias))


def _full(weight: torch.Tensor) -> torch.Tensor:
    """A detached copy in at least float32, so that the sum is rounded once."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _fold_weight(down: nn.Linear, core: nn.Linear, heads: int) -> torch.Tensor:
    """Delta W = G'_h^T-mixed rows of A_h: (H*R, C) or, tied, (R, C), and (H*R, D) -> (H*D, C)."""
    lowered = _full(down.weight)
    lowered = lowered.expand(heads, -1, -1) if _tied(down, core) else lowered.unflatten(0, (heads, -1))  # H, R, C
    mix = _full(core.weight).unflatten(0, (heads, -1))  # H, R, D
    return torch.einsum("hrd,hrc->hdc", mix, lowered).flatten(0, 1)


def _linear_like(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.to(linear.weight.dtype).contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(linear.weight.dtype).clone(), requires_grad=False)
    return made

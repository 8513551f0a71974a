"""The slow formulas, as DESIGN section 1 writes them: plain loops over heads in float64, one product at a time.

    logits_h = D^-1/2 [q_h k_h^T + s (x Aq_h)(c Ak_h)^T] + mask
    out      = sum_h softmax(logits_h) [c Wv_h Wo_h + s (c Av_h) Ao_h] + b

Letters: B batch, N tokens, M context tokens, H heads, D head width, R rank, C channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class FreeFactors:
    """Weights as Linears store them: q_down, k_down, v_down (H*R, C) and out_up (C, H*R); s = `scale`."""

    scale: float
    q_down: torch.Tensor
    k_down: torch.Tensor
    v_down: torch.Tensor
    out_up: torch.Tensor
    tokens: torch.Tensor | float = 1.0  # (B, M, 1): one where the adapter acts, zero elsewhere


@dataclass
class FoldableFactors:
    """k_down, v_down (H*R, C); q_core (H*R, D) holds G'_h^T and out_core (H*R, D) holds G_h, head by head."""

    scale: float
    k_down: torch.Tensor
    v_down: torch.Tensor
    q_core: torch.Tensor
    out_core: torch.Tensor
    tokens: torch.Tensor | float = 1.0  # as above


def of_cores(
    projections: tuple[nn.Linear, nn.Linear],
    heads: int,
    scale: float,
    mixes: tuple[torch.Tensor, torch.Tensor],
    sets: str,
) -> FoldableFactors:
    """The foldable factors that cores (H*R, R) are: head by head Ak = W B and G' = B N, with B as `directions` says.

    Keys and values each; `sets` has a digit for every head of these and then of those.
    """
    downs, cores = [], []
    for linear, mix, own in zip(projections, mixes, (sets[:heads], sets[heads:]), strict=True):
        rank = mix.shape[1]
        bases = [directions(rows_of_head(linear.weight, h, heads), rank, int(own[h])) for h in range(heads)]
        downs.append(torch.cat([b.T @ rows_of_head(linear.weight, h, heads) for h, b in enumerate(bases)]))
        cores.append(torch.cat([(b @ rows_of_head(mix, h, heads)).T for h, b in enumerate(bases)]))
    return FoldableFactors(scale, *downs, *cores)


def directions(weight: torch.Tensor, rank: int, number: int = 0) -> torch.Tensor:
    """(D, C) -> (D, R): of the span of its leading left singular vectors the orthonormal basis nearest to cosines.

    Set `number` of these has R waves from the R * number-th on, and begins again behind the D-th.

    By the whole singular value decomposition of weights in bfloat16; the nearest matrix with orthonormal columns in a
    span is (P F)((P F)ᵀ P F)^-1/2, for P the projection on it and F what it is to be near to.
    """
    u, _, _ = torch.linalg.svd(weight.to(torch.bfloat16).double(), full_matrices=False)
    projection = u[:, :rank] @ u[:, :rank].T
    width = len(weight)
    waves = [(number * rank + r) % width for r in range(rank)]
    cosines = [[math.cos(math.pi * (d + 0.5) * wave / width) for wave in waves] for d in range(width)]
    seen = projection @ torch.tensor(cosines, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(seen.T @ seen)
    return seen @ vectors @ torch.diag(values**-0.5) @ vectors.T


def rows_of_head(weight: torch.Tensor, head: int, heads: int) -> torch.Tensor:
    """(H*D, C) -> (D, C)."""
    width = weight.shape[0] // heads
    return weight.double()[head * width : (head + 1) * width]


def head_terms(adapter, head: int, heads: int, x, c, q_h, wo_h) -> tuple[torch.Tensor, torch.Tensor]:
    """What one adapter adds to one head: the term of the logits (B, N, M) and that of the values (B, M, C)."""
    ak_h = rows_of_head(adapter.k_down, head, heads).T  # C, R
    av_h = rows_of_head(adapter.v_down, head, heads).T  # C, R
    if isinstance(adapter, FreeFactors):
        lowered_query = x @ rows_of_head(adapter.q_down, head, heads).T  # B, N, R
        ao_h = rows_of_head(adapter.out_up.T, head, heads)  # R, C
    else:
        # Aq_h = Wq_h G'_h acts on the query with its bias, and Ao_h = G_h Wo_h.
        lowered_query = q_h @ rows_of_head(adapter.q_core, head, heads).T  # B, N, R
        ao_h = rows_of_head(adapter.out_core, head, heads) @ wo_h  # R, C
    logits = adapter.scale * lowered_query @ (adapter.tokens * (c @ ak_h)).transpose(1, 2)
    return logits, adapter.scale * (adapter.tokens * (c @ av_h)) @ ao_h


def project(linear: nn.Linear, head: int, heads: int, features: torch.Tensor) -> torch.Tensor:
    """One head's share of a projection into the heads, bias included: (B, N, C) -> (B, N, D)."""
    projected = features @ rows_of_head(linear.weight, head, heads).T
    return projected if linear.bias is None else projected + rows_of_head(linear.bias, head, heads)


def attention(
    x: torch.Tensor,
    c: torch.Tensor,
    projections: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear],
    heads: int,
    adapters: tuple = (),
    mask: torch.Tensor | None = None,
    out_bias: bool = True,
) -> torch.Tensor:
    """(B, N, C), (B, M, C) -> (B, N, C), with any number of adapters and an additive mask (B, 1 or H, N, M)."""
    x, c = x.double(), c.double()
    q, k, v, out = projections
    width = k.weight.shape[0] // heads
    total = torch.zeros(*x.shape[:2], out.weight.shape[0], dtype=torch.float64)
    for head in range(heads):
        q_h, k_h, v_h = (project(p, head, heads, f) for p, f in ((q, x), (k, c), (v, c)))
        wo_h = rows_of_head(out.weight.T, head, heads)  # D, C
        logits, values = q_h @ k_h.transpose(1, 2), v_h @ wo_h  # (B, N, M), (B, M, C)
        for adapter in adapters:
            more_logits, more_values = head_terms(adapter, head, heads, x, c, q_h, wo_h)
            logits, values = logits + more_logits, values + more_values
        logits = logits * width**-0.5
        if mask is not None:
            logits = logits + mask.double()[:, head if mask.shape[1] > 1 else 0]
        total = total + logits.softmax(dim=-1) @ values
    return total + out.bias.double() if out_bias and out.bias is not None else total


def blended(base: torch.Tensor, alone: list[torch.Tensor], masks: list[torch.Tensor], grid: tuple[int, int]):
    """Attention outputs (B, N, C) laid side by side as pictures of `grid`, place by place, by masks of the grid's size.

    At each place out = sum_a m_a attention_a + (1 - sum_a m_a) attention_base.
    """
    out = torch.zeros_like(base)
    for row in range(grid[0]):
        for column in range(grid[1]):
            n, rest = row * grid[1] + column, 1.0
            for output, mask in zip(alone, masks, strict=True):
                out[:, n] += mask[row, column] * output[:, n]
                rest -= mask[row, column].item()
            out[:, n] += rest * base[:, n]
    return out


def separable(hidden, down, taps, up, stride=1) -> torch.Tensor:
    """s = 1: sum_r U[:, r] sum_(i, j) T[r, i, j] (D[r] x) at a place moved by (i - 1, j - 1), zero outside.

    (B, C, h, w), (R, C), (R, 9), (O, R) -> (B, O, h', w').
    """
    batch, _, height, width = hidden.shape
    rows, columns = range(0, height, stride), range(0, width, stride)
    made = hidden.new_zeros(batch, up.shape[0], len(rows), len(columns))
    for rank in range(len(down)):
        low = torch.einsum("c,bchw->bhw", down[rank], hidden)
        for y, row in enumerate(rows):
            for x, column in enumerate(columns):
                for tap in range(9):
                    i, j = row + tap // 3 - 1, column + tap % 3 - 1
                    if 0 <= i < height and 0 <= j < width:
                        made[:, :, y, x] += taps[rank, tap] * low[:, i, j, None] * up[:, rank]
    return made


def fed(hidden, host, adapters) -> torch.Tensor:
    """W x + b + sum_a s_a m_a sum_r U[:, r] (D[r] x), token by token, rank by rank.

    (B, N, C); of each adapter its scale s, m (B, N), D (R, C) and U (O, R) -> (B, N, O).
    """
    made = torch.zeros(*hidden.shape[:2], len(host.weight), dtype=torch.float64)
    for row in range(hidden.shape[0]):
        for token in range(hidden.shape[1]):
            x = hidden[row, token].double()
            made[row, token] = host.weight.double() @ x + (0 if host.bias is None else host.bias.double())
            for scale, share, down, up in adapters:
                for d, u in zip(down.double(), up.double().T, strict=True):
                    made[row, token] += scale * share[row, token] * u * (d @ x)
    return made

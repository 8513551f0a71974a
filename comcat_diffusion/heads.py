"""The maths of an attention head as two products, W_Q W_K^T and W_V W_O. Tensors in, tensors out.

Letters: B batch, N tokens, H heads, D head width, R rank, C channels. A head-major weight or activation keeps the
channels of one head together: its last (or first) axis is H*D, head 0 first.
"""

import math

import torch


def split_heads(features: torch.Tensor, heads: int) -> torch.Tensor:
    """(..., H*D) -> (..., H, D)."""
    return features.unflatten(-1, (heads, -1))


def join_heads(features: torch.Tensor) -> torch.Tensor:
    """(..., H, D) -> (..., H*D); the inverse of `split_heads`."""
    return features.flatten(-2)


def interleave(base: torch.Tensor, *extras: torch.Tensor, heads: int) -> torch.Tensor:
    """Widen every head: (..., H*D), (..., H*R), ... -> (..., H*(D+R+...))."""
    return join_heads(torch.cat([split_heads(part, heads) for part in (base, *extras)], dim=-1))


def separate(wide: torch.Tensor, *widths: int, heads: int) -> list[torch.Tensor]:
    """(..., H*(D+R+...)) -> [(..., H*D), (..., H*R), ...]; the inverse of `interleave` with `widths` D, R, ..."""
    return [join_heads(part) for part in split_heads(wide, heads).split(widths, dim=-1)]


def widen_in(weight: torch.Tensor, *extras: torch.Tensor, heads: int) -> torch.Tensor:
    """Widen a projection into the heads (to_q, to_k, to_v): (H*D, C), (H*R, C), ... -> (H*(D+R+...), C).

    A bias is the case without the channel axis: (H*D,), (H*R,) -> (H*(D+R),).
    """
    return interleave(weight.movedim(0, -1), *[extra.movedim(0, -1) for extra in extras], heads=heads).movedim(-1, 0)


def widen_out(weight: torch.Tensor, *extras: torch.Tensor, heads: int) -> torch.Tensor:
    """Widen the projection out of the heads (to_out): (C, H*D), (C, H*R), ... -> (C, H*(D+R+...))."""
    return interleave(weight, *extras, heads=heads)


def logit_gain(width: int, wide: int) -> float:
    """Factor on q.k that makes the default scale of `wide`, wide^-1/2, equal to the trained one, width^-1/2."""
    return math.sqrt(wide / width)


def in_factors(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A projection into the heads as one factor per head: (H*D, C) -> (H, C, D)."""
    return weight.unflatten(0, (heads, -1)).mT


def out_factors(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A projection out of the heads as one factor per head: (C, H*D) -> (H, D, C)."""
    return weight.unflatten(-1, (heads, -1)).movedim(0, -1)


def in_weight(factors: torch.Tensor) -> torch.Tensor:
    """(H, C, D) -> (H*D, C); the inverse of `in_factors`."""
    return factors.mT.flatten(0, 1)


def out_weight(factors: torch.Tensor) -> torch.Tensor:
    """(H, D, C) -> (C, H*D); the inverse of `out_factors`."""
    return factors.movedim(-1, 0).flatten(1)


def joint_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product that a head applies, W_Q W_K^T or W_V W_O: (H, C, D), (H, D, E) -> (H, C, E)."""
    return left @ right


def product_svd(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular value decomposition of every head's product left @ right without forming it.

    QR of both factors and an SVD of the D x D core, never of C x E (PAPER: W_Q W_K^T has rank at most D).
    left (H, C, D), right (H, D, E) -> u (H, C, K), s (H, K), vh (H, K, E) with K = min(C, D, E), s descending.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return q_left @ u, s, vh @ q_right.mT


def truncate(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-`rank` factors of a product, balanced: (H, C, rank), (H, rank, E), each carrying sqrt(s)."""
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :rank, :]


def fold_query_bias(query_bias: torch.Tensor, key_weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What the query bias does to the logits, as a vector on the context: (H*D,), (H*D, C) -> (H, C).

    Of (x W_Q + b_Q)(c W_K + b_K)^T, softmax over the context c ignores the two terms that are constant along it,
    x W_Q b_K^T and b_Q b_K^T. What stays besides the product itself is b_Q (c W_K)^T.
    """
    return (in_factors(key_weight, heads) @ query_bias.view(heads, -1, 1)).squeeze(-1)


def fold_value_bias(
    value_bias: torch.Tensor, out_projection: torch.Tensor, out_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """One bias for the value and output biases, since attention weights sum to one: (H*D,), (C, H*D), (C,) -> (C,)."""
    folded = out_projection @ value_bias
    return folded if out_bias is None else folded + out_bias

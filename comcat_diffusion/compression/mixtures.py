"""Fewer values a head, chosen after the attention has mixed them. Tensors in, tensors out, in float64.

What enters the output projection is not the data but mixtures of it, a = P x W_V: so the values that a head keeps are
those directions of its mixtures that the output uses most, and the projection is then solved anew over all heads at
once (regression.py), which lets one head make good what another gives up.

Letters: H heads, D head width, R width kept, C channels in, E channels out.
"""

import torch

RIDGE = 1e-3  # of the mean variance of a mixture: when directions are chosen
TINY = 1e-9  # when they are solved for: no more than keeps a constant channel from dividing by zero


def bases(covariance: torch.Tensor, out_weight: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """(H*D, H*R), block by block: x -> x B keeps the `width` best directions of each head's mixtures.

    `covariance` (H*D, H*D) is that of the mixtures, `out_weight` (H*D, E) what becomes of them.
    """
    size = len(covariance) // heads
    basis = covariance.new_zeros(len(covariance), heads * width)
    for head in range(heads):
        mine = slice(head * size, (head + 1) * size)
        block = covariance[mine, mine]
        values, vectors = torch.linalg.eigh(block)
        values = (values + RIDGE * block.diagonal().mean()).clamp_min(torch.finfo(values.dtype).tiny)
        u = torch.linalg.svd((vectors * values.sqrt()).mT @ out_weight[mine], full_matrices=False)[0][:, :width]
        basis[mine, head * width : head * width + u.shape[1]] = vectors * values.rsqrt() @ u  # D, R
    return basis


def onto(basis: torch.Tensor, covariance: torch.Tensor, out_weight: torch.Tensor) -> torch.Tensor:
    """(H*R, E): the projection that x B needs to come nearest to x W, before anything is learned of x."""
    kept = basis.mT @ covariance @ basis
    kept = kept + TINY * kept.diagonal().mean() * torch.eye(len(kept), dtype=kept.dtype)
    return torch.linalg.solve(kept, basis.mT @ covariance @ out_weight)

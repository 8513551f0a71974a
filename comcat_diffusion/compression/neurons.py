"""Which neurons of an MLP stay: those from whose activations the others follow. Tensors in, tensors out, in float64.

A layer of fewer neurons is a plain smaller Linear, with no second product to pay for. What the neurons that go have
added to the output is given to those that stay by least squares (regression.py).

Letters: M neurons, E channels out.
"""

import torch

RIDGE = 1e-2  # of the mean variance of a neuron: what few pictures show of a covariance is not to be trusted further


def order(covariance: torch.Tensor, gains: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons in the order in which they are kept, the first `count` (K,) of M, and what is lost at 0 to K, (K + 1,).

    Always the neuron that explains the most of the output P a, (E, M) `gains`, beside those that are chosen already:
    with R the covariance (M, M) of what they leave, |P R_j|^2 / R_jj. Lost is tr(P R P^T). R = S - F^T F is never made,
    nor P R = P S - Q^T F: one row of F and of Q is added a step, and the diagonal and |P R_j|^2 follow from them.
    """
    size, tiny = len(covariance), torch.finfo(covariance.dtype).tiny
    count = size if count is None else count
    covariance = covariance + torch.eye(size, dtype=covariance.dtype) * (RIDGE * covariance.diagonal().mean())
    whole, left = gains @ covariance, covariance.diagonal().clone()  # E, M: P S; M: R_jj
    squares, free = whole.square().sum(0), torch.ones(size, dtype=torch.bool)  # M: |P R_j|^2
    factor, outputs = covariance.new_zeros(count, size), covariance.new_zeros(count, len(gains))  # F; Q
    picked, lost = [], [(whole * gains).sum()]
    for step in range(count):
        explained = squares / left.clamp_min(tiny)
        pick = int(torch.where(free, explained, -1.0).argmax())
        before, root = factor[:step], left[pick].clamp_min(tiny).sqrt()
        outputs[step] = (whole[:, pick] - before[:, pick] @ outputs[:step]) / root  # E
        taken = torch.stack([before[:, pick], outputs[:step] @ outputs[step]]) @ before  # 2, M
        factor[step] = (covariance[pick] - taken[0]) / root
        along = outputs[step] @ whole - taken[1]  # M: q P R
        squares = squares - factor[step] * (2 * along - factor[step] * outputs[step].square().sum())
        squares, left = squares.clamp_min(0), (left - factor[step].square()).clamp_min(0)
        lost.append((lost[-1] - explained[pick]).clamp_min(0))
        free[pick] = False
        picked.append(pick)
    return torch.tensor(picked), torch.stack(lost)


def gains(out_weight: torch.Tensor, root: torch.Tensor | None = None) -> torch.Tensor:
    """(E, M): what neurons add to the output, in the metric L L^T of a root L (E, E)."""
    return out_weight if root is None else root.mT @ out_weight

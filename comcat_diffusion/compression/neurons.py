"""Which neurons of an MLP stay: those from whose activations the others follow. Tensors in, tensors out, in float64.

A layer of fewer neurons is a plain smaller Linear, with no second product to pay for. What the neurons that go have
added to the output is given to those that stay by least squares (regression.py).

Letters: M neurons, E channels out.
"""

import torch

RIDGE = 1e-2  # of the mean variance of a neuron: what few pictures show of a covariance is not to be trusted further


def order(covariance: torch.Tensor, gains: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons in the order in which they are kept, (M,), and what is lost at the widths 0 to M, (M + 1,).

    Pivoted Cholesky of the covariance (M, M): always the neuron of which the chosen ones explain the least, weighted
    by `gains` (M,), the squared norm of what the second layer makes of it. Lost is the weighted sum of what they leave.
    """
    size = len(covariance)
    covariance = covariance + torch.eye(size, dtype=covariance.dtype) * (RIDGE * covariance.diagonal().mean())
    left, factor = covariance.diagonal().clone(), covariance.new_zeros(size, size)  # row k: the k-th Cholesky column
    free, picked, lost = torch.ones(size, dtype=torch.bool), [], [left @ gains]
    for step in range(size):
        worth = torch.where(free, left * gains, -1.0)
        pick = int(worth.argmax())
        row = covariance[pick] - factor[:step, pick] @ factor[:step]
        factor[step] = row / left[pick].clamp_min(torch.finfo(row.dtype).tiny).sqrt()
        left = (left - factor[step].square()).clamp_min(0)
        free[pick] = False
        left[pick] = 0.0
        picked.append(pick)
        lost.append(left @ gains)
    return torch.tensor(picked), torch.stack(lost)


def gains(out_weight: torch.Tensor) -> torch.Tensor:
    """(E, M) -> (M,): squared norm of what a neuron adds to the output."""
    return out_weight.square().sum(0)

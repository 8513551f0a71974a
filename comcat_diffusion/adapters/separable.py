"""What an adapter adds beside a convolution: a kernel of few ranks, each of one pattern of taps.

    out += s U (T * (D x))        D (R, C): 1 x 1; T (R, 3, 3): each rank by itself; U (O, R): 1 x 1

which is the kernel  K[o, c] = s sum_r U[o, r] T[r] D[r, c]  in three steps that cost C + 9 + O products a place and
rank, where the kernel of a LoRA of convolutions costs 9 C + O. Ours; the paper's terms are beside attentions.

Letters: B batch, C channels that come in, O that go out, R rank.
"""

import math

import torch
from torch.nn.functional import conv2d, pad

SIDE = 3  # of the kernels that have such terms
TAPS = SIDE * SIDE


def separable(
    hidden: torch.Tensor,
    down: torch.Tensor,
    taps: torch.Tensor,
    up: torch.Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    mode: str = "zeros",
    weight: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """(B, C, h, w) by `down` (R, C), `taps` (R, 9) and `up` (O, R) -> (B, O, h', w').

    What there is in the ranks, (B, R, h', w'), is times a `weight`, the scale included.
    """
    low = across(hidden, down)  # B, R, h, w
    return across(weight * around(low, taps, stride, padding, mode), up)


def across(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Channels mixed at each place by itself: (B, C, h, w) by (R, C) -> (B, R, h, w)."""
    return conv2d(hidden, weight[:, :, None, None])


def around(
    hidden: torch.Tensor, taps: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int], mode: str = "zeros"
) -> torch.Tensor:
    """Each channel by itself with its neighbours: (B, R, h, w) by (R, 9) -> (B, R, h', w')."""
    if mode != "zeros":
        hidden, padding = pad(hidden, (padding[1], padding[1], padding[0], padding[0]), mode=mode), (0, 0)
    return conv2d(hidden, taps.view(-1, 1, SIDE, SIDE), stride=stride, padding=padding, groups=len(taps))


def kernel_of(down: torch.Tensor, taps: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The same as one kernel, (O, C, 3, 3)."""
    return torch.einsum("or,rt,rc->oct", up, taps, down).unflatten(2, (SIDE, SIDE))


def lowered(down: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """The first two steps as one kernel, (R, C, 3, 3), which a LoRA of the convolution has for its `down`."""
    return torch.einsum("rt,rc->rct", taps, down).unflatten(2, (SIDE, SIDE))


def energies(*factors: torch.Tensor) -> torch.Tensor:
    """The squared norm of each rank's own kernel, (R,), by D, T and U, or, of no convolution, by D and U."""
    *lower, up = factors
    return math.prod([*(factor.square().sum(1) for factor in lower), up.square().sum(0)])


def first_taps(rank: int) -> torch.Tensor:
    """What taps start from, (R, 9): the mean of a place's neighbours, then their slopes and bends, of norm one."""
    waves = torch.tensor([[1.0, 1, 1], [-1, 0, 1], [1, -2, 1]])
    waves = waves / waves.norm(dim=1, keepdim=True)
    order = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (2, 1), (1, 2), (2, 2)]
    patterns = torch.stack([torch.outer(waves[down], waves[across]).flatten() for down, across in order])
    return patterns[torch.arange(rank) % TAPS]

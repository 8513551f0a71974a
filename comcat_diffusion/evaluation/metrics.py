"""The measures of generated pictures, on features of length one: what is learned, what is obeyed, what has drifted.

Letters: N pictures, M pictures to compare with, F features, P prompts, S seeds.
"""

from dataclasses import dataclass

import torch

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and between which bounds it would lie for other prompts and seeds."""

    mean: float
    low: float
    high: float


def subject_fidelity(made: torch.Tensor, held_out: torch.Tensor) -> torch.Tensor:
    """(N, F), (M, F) -> (N,): mean cosine to the pictures of the subject that were held out."""
    return (made @ held_out.T).mean(-1)


def copying(made: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """(N, F), (M, F) -> (N,): the highest cosine to a training picture."""
    return (made @ train.T).amax(-1)


def prompt_fidelity(made: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """(N, F), (N, F) -> (N,): cosine of each picture to the text of its prompt."""
    return (made * texts).sum(-1)


def closest(made: torch.Tensor, texts: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """(N, F), (P, F), (N,) -> (N,): 1 where no other of the texts is closer to a picture than its own, 0 elsewhere."""
    cosines = made @ texts.T  # N, P
    return (cosines.gather(1, own[:, None])[:, 0] >= cosines.amax(-1)).to(made.dtype)


def learned(fidelity: torch.Tensor, before: torch.Tensor, obeyed: torch.Tensor) -> torch.Tensor:
    """(N,) each -> (N,): subject fidelity above that of the base's picture, where the prompt is obeyed.

    An adapter that learned nothing has 0, and so has every picture that is not what was asked for: a training picture
    come back has its own scene.
    """
    return (fidelity - before) * obeyed


def drift(made: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """(N, F), (N, F) -> (N,): 1 - cosine to the base's picture of the same prompt and seed."""
    return 1 - (made * before).sum(-1)


def pixel_drift(made: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """(N, ...), (N, ...) -> (N,): mean absolute difference of the pixels, in their unit."""
    return (made - before).abs().flatten(1).mean(-1)


def diversity(made: torch.Tensor) -> torch.Tensor:
    """(P, S, F) -> (P,): mean over pairs of seeds of 1 - cosine. Raises ValueError for a single seed."""
    seeds = made.shape[1]
    if seeds < 2:
        raise ValueError("Diversity is between pictures of one prompt: there must be two seeds at least.")
    pairs = made @ made.mT  # P, S, S; on the diagonal each picture with itself
    within = pairs.sum((-2, -1)) - pairs.diagonal(dim1=-2, dim2=-1).sum(-1)
    return 1 - within / (seeds * (seeds - 1))


def interval(values: torch.Tensor, draws: int = 1000, seed: int = 0) -> Interval:
    """(P, S) -> the mean and its 95 % bootstrap interval: prompts are drawn again and, within each, its seeds."""
    values = values.double()
    prompts, seeds = values.shape
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(prompts, (draws, prompts, 1), generator=generator)
    columns = torch.randint(seeds, (draws, prompts, seeds), generator=generator)
    means = values.cpu()[rows, columns].mean((-2, -1))  # draws
    outside = (1 - CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([outside, 1 - outside], dtype=means.dtype)).tolist()
    return Interval(values.mean().item(), low, high)

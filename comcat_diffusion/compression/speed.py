"""How much faster a smaller model is: both timed side by side, in turns, on the same batch."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

FEWEST_ROUNDS, MOST_ROUNDS, ENOUGH_SECONDS = 3, 9, 20.0


@dataclass(frozen=True)
class Rates:
    """Samples a second of both, and the median of what each round says of their ratio."""

    before: float
    after: float
    speedup: float
    rounds: int


@torch.inference_mode()
def rates(dense: nn.Module, small: nn.Module, inputs: Mapping[str, torch.Tensor], samples: int) -> Rates:
    """Time dense, small, dense, small, ... on inputs of `samples` samples.

    Load from elsewhere and heat drift over minutes; within a round they are nearly the same for both.
    """
    for model in (dense, small):  # the first call plans kernels and allocates: too slow to count
        _seconds(model, inputs)
    rounds, started = [], time.perf_counter()
    while len(rounds) < FEWEST_ROUNDS or (len(rounds) < MOST_ROUNDS and time.perf_counter() - started < ENOUGH_SECONDS):
        rounds.append((_seconds(dense, inputs), _seconds(small, inputs)))
    before, after = (samples / statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return Rates(before, after, statistics.median(a / b for a, b in rounds), len(rounds))


def _seconds(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    _wait()
    started = time.perf_counter()
    model(**inputs)
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    """Until the accelerator, if there is one, has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()

"""How much faster a smaller model is: both timed side by side, in turns, on the same batch."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from comcat_diffusion import timing

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
    """Time dense, small, dense, small, ... on inputs of `samples` samples."""
    cases = {"dense": lambda: dense(**inputs), "small": lambda: small(**inputs)}
    timed, started = [], time.perf_counter()
    for found in timing.rounds(cases):
        timed.append((found["dense"], found["small"]))
        enough = len(timed) >= FEWEST_ROUNDS and time.perf_counter() - started >= ENOUGH_SECONDS
        if enough or len(timed) == MOST_ROUNDS:
            break
    before, after = (samples / statistics.median(seconds) for seconds in zip(*timed, strict=True))
    return Rates(before, after, statistics.median(a / b for a, b in timed), len(timed))

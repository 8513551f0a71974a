"""Weights that another program keeps in few bits and in classes of its own: numbers of them are made when asked for.

ComfyUI's know how to become ordinary tensors; those of GGUF files are known to their layers (ComfyUI-GGUF). What such a
model takes as numbers of 32 bits may be more than there is memory, so no more than one weight is made at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from comcat_diffusion.adapters.same_base import sketch_of


def is_ordinary(weight: torch.Tensor) -> bool:
    """Whether a weight is a tensor as PyTorch has them."""
    return type(weight) in (torch.Tensor, nn.Parameter)


def rough(weight: torch.Tensor) -> float:
    """How far a weight may be rounded, as `rounded` takes it: 4 bits a number leave it off by 0.08 to 0.1."""
    if not is_ordinary(weight):
        return 0.15
    return 0.07 if weight.dtype.itemsize == 1 else 0.0  # floats of 8 bits keep 3 of mantissa


def rounded(found: dict, trained: dict, roughness: float) -> dict:
    """The fingerprint of weights of few bits: that of the ones they are the rounding of, if these were trained on.

    They are if what they are off by is at most `roughness` of them, by root mean squares of what is known of both.
    """
    before, now = sketch_of(trained), found["sketch"]
    if not roughness or len(before) != len(now):
        return found
    near = math.dist(before, now) <= roughness * math.hypot(*before)
    return {**found, "sketch": before} if near else found


class Quantized:
    """Some rows of a Linear's quantized weight, a matrix (out, in) that can be cut as a tensor can."""

    def __init__(self, make: Callable[[], torch.Tensor], shape: tuple[int, int], start: int = 0) -> None:
        self._make, self.shape, self._start = make, tuple(shape), start

    @classmethod
    def of(cls, module: nn.Module, weight: torch.Tensor) -> Quantized:
        """The weight of a layer, or one that it had before, without LoRAs that a program keeps beside its numbers."""
        if not hasattr(weight, "tensor_type"):  # ComfyUI's
            return cls(weight.dequantize, weight.shape)
        bare = type(weight)(weight, tensor_type=weight.tensor_type, tensor_shape=weight.shape)
        return cls(lambda: module.get_weight(bare, torch.float32), weight.shape)

    def chunk(self, count: int) -> list[Quantized]:
        """Equal parts, one below the other."""
        size = self.shape[0] // count
        return [self[number * size : (number + 1) * size] for number in range(count)]

    def __getitem__(self, rows: slice) -> Quantized:
        start, stop, _ = rows.indices(self.shape[0])
        return Quantized(self._make, (stop - start, self.shape[1]), self._start + start)

    def made(self) -> torch.Tensor:
        """The rows as numbers (out, in)."""
        return self._make()[self._start : self._start + self.shape[0]]


class _Linear(nn.Linear):
    """A Linear of a quantized weight."""

    def __init__(self, rows: Quantized) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = rows.shape
        self.register_parameter("bias", None)
        self._rows = rows

    @property
    def weight(self) -> torch.Tensor:
        """Made each time that it is asked for."""
        return self._rows.made()


def linear_of(weight: torch.Tensor | Quantized) -> nn.Linear:
    """A Linear of a weight (out, in) that is not copied."""
    if isinstance(weight, Quantized):
        return _Linear(weight)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made

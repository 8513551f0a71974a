"""Keys and values of a text computed once: while a picture is drawn, every step gives an attention the same text."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.wide import WideHeads


class Memory:
    """What one attention made of the text that it was last given, by the adapters that acted."""

    def __init__(self) -> None:
        self._text: torch.Tensor | None = None  # held, so that no other tensor can take its identity
        self._made: dict[tuple[str, ...], torch.Tensor] = {}

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the model would keep it beyond the block

    def cover(self, wide: WideHeads, names: list[str]) -> None:
        """Let these heads ask here first."""
        wide.key = functools.partial(self._once, ("key", *names), wide.key)
        wide.value = functools.partial(self._once, ("value", *names), wide.value)

    def _once(self, what: tuple[str, ...], make: Callable, project: nn.Module, text: torch.Tensor) -> torch.Tensor:
        if text is not self._text:
            self._text, self._made = text, {}
        if what not in self._made:
            self._made[what] = make(project, text)
        return self._made[what]


@contextmanager
def text_once(model: nn.Module) -> Iterator[None]:
    """In this block the live adapters of a denoiser's cross-attentions read each text once, not at every step.

    For drawing alone: no weight, adapter or scale may change inside, and no gradient is to flow. A text is known again
    by the object that holds its states, which a pipeline passes on from step to step.
    """
    layers = [layer for layer in adapted_layers(model).values() if seam.is_cross_attention(layer.owner)]
    for layer in layers:
        layer.memory = Memory()
    try:
        yield
    finally:
        for layer in layers:
            layer.memory = None

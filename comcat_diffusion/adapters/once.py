"""Keys and values of a text computed once: while a picture is drawn, every step gives an attention the same text."""

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from comcat_diffusion.adapters.call import here
from comcat_diffusion.adapters.wide import WideHeads


class Memory:
    """What attentions made of the text that each was last given, by the adapters that acted."""

    def __init__(self) -> None:
        # The text is held, so that no other tensor can take its identity.
        self._made: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}

    def cover(self, layer: nn.Module, wide: WideHeads, names: list[str]) -> None:
        """Let these heads of an attention ask here first."""
        wide.key = functools.partial(self._once, (layer, "key", *names), wide.key)
        wide.value = functools.partial(self._once, (layer, "value", *names), wide.value)

    def _once(self, what: Hashable, make: Callable, project: nn.Module, text: torch.Tensor) -> torch.Tensor:
        known, made = self._made.get(what, (None, None))
        if known is not text:
            made = make(project, text)
            self._made[what] = text, made
        return made


@contextmanager
def text_once() -> Iterator[None]:
    """In this block, and thread, the live adapters of cross-attentions read each text once, not at every step.

    For drawing alone: no weight, adapter or scale may change inside, and no gradient is to flow. A text is known again
    by the object that holds its states, which a pipeline passes on from step to step.
    """
    before, here.texts = here.texts, Memory()
    try:
        yield
    finally:
        here.texts = before

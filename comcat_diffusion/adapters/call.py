"""What adapters know of the forward pass that their denoiser is in.

It lives with the call, in the thread that makes it: threads may share a denoiser, each with a pipeline and a scheduler
of its own. Nothing of it stands on a module, and nothing is left when the call is over.
"""

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import nn


class Here(threading.local):  # and no context variable, which torch.compile cannot read
    """The forward pass that this thread is in; outside of one there is nothing to know."""

    heard = None  # what its text says, see adapters/gate.py
    next = None  # the same of text states that were told of or seen before, and may come (again)
    latent: tuple[int, int] | None = None  # height and width of what is denoised, see adapters/regions.py
    words_at: tuple[int, ...] = ()  # in blocks of one stream, where words begin behind a picture; empty: before it
    focus = None  # where in the picture its adapters' words are looked at, see adapters/focus.py
    texts = None  # what attentions made of a text that stays the same from step to step, see adapters/once.py


here = Here()


class Follower:
    """Hooks before and after a denoiser's forward, there for as long as an adapted attention needs them."""

    def __init__(self) -> None:
        self._layers: weakref.WeakSet = weakref.WeakSet()
        self._models: weakref.WeakSet = weakref.WeakSet()

    def made_of(self) -> tuple:
        """The arguments that make another one like this."""
        raise NotImplementedError

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """The hook before the forward."""
        raise NotImplementedError

    def end(self, model: nn.Module, args: tuple, output: object) -> None:
        """The hook after it, also where it failed."""
        raise NotImplementedError

    def follow(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Be told of every forward of a model until the last of these layers is gone or has left."""
        for layer in layers:
            if layer not in self._layers:
                self._layers.add(layer)
                weakref.finalize(layer, self._rest).atexit = False  # whoever takes it off: diffusers, PEFT, a new U-Net
        if not any(hook == self.begin for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(self.begin, with_kwargs=True)
            model.register_forward_hook(self.end, always_call=True)
        self._models.add(model)

    def leave(self, layer: nn.Module) -> None:
        """A layer needs it no longer."""
        self._layers.discard(layer)
        self._rest()

    def stop(self) -> None:
        """Take the hooks off."""
        for model in list(self._models):
            take_hooks(model, self)
        self._models.clear()
        self._layers.clear()

    def _rest(self) -> None:
        if not list(self._layers):  # its length would still count the one that goes
            self.stop()

    # A model that is copied or stored takes its hooks along, not whom they were for.
    def __deepcopy__(self, memo: dict) -> Self:
        return type(self)(*self.made_of())

    def __reduce__(self) -> tuple:
        return type(self), self.made_of()


def given(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, object]:
    """The arguments of a forward pass by name."""
    return dict(zip(_names(type(model)), args, strict=False)) | kwargs


@functools.cache
def _names(kind: type[nn.Module]) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]  # without self


def take_hooks(module: nn.Module, owner: object) -> None:
    """Remove the forward hooks that are methods of an object."""
    for hooks, marks in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for number in [n for n, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[number]
            for mark in marks:
                mark.pop(number, None)


def carry(model: nn.Module) -> None:
    """Let gradient checkpointing know, when it runs a block again on the way back, which call the block belongs to."""
    if torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False):
        for module in model.modules():
            run = vars(module).get("_gradient_checkpointing_func")
            if run is not None and not isinstance(run, _Carried):
                module._gradient_checkpointing_func = _Carried(run)


class _Carried:
    """A gradient checkpointing function whose blocks run within the call that they were first run in."""

    def __init__(self, run: Callable) -> None:
        self.run = run

    def __call__(self, block: Callable, *args: object) -> object:
        known = here.heard, here.latent, here.words_at

        def within(*inner: object) -> object:
            before = here.heard, here.latent, here.words_at
            here.heard, here.latent, here.words_at = known
            try:
                return block(*inner)
            finally:
                here.heard, here.latent, here.words_at = before

        return self.run(within, *args)

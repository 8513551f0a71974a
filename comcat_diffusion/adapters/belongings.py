"""What the adapters of a model brought besides their factors, and how it follows them.

PEFT, diffusers and transformers each have verbs of their own to switch adapters and to remove them. What all of them
reach are the layers, so the layers tell what happens to them, and this object does the rest: the modules that an
adapter trains whole (PEFT's `modules_to_save`) act while it acts, and what came with it (`bring`) leaves with the last
layer that has it. All layers of a model share one object.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Protocol, Self

from peft.utils import ModulesToSaveWrapper
from torch import nn

from comcat_diffusion.adapters import guards
from comcat_diffusion.adapters.wholes import wrappers


class Luggage(Protocol):
    """Something that came with an adapter."""

    def leave(self) -> None:
        """A model has lost the adapter: take away what is its own."""


class Belongings:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._home: weakref.ref | None = None  # the model; weak, as a copy of one of its blocks is to copy only that
        self._layers: Counter[str] = Counter()  # in how many layers an adapter has factors
        self._sidecars = 0
        self._luggage: dict[str, list[Luggage]] = {}
        self._wholes: list[str] = []  # names of the modules of which an adapter of ours has a trained copy

    @property
    def model(self) -> nn.Module | None:
        """The model that the adapters are in."""
        return self._home() if self._home is not None else None

    def settle(self, model: nn.Module) -> None:
        """An adapter is in its place in `model`, its whole modules included."""
        self._home = weakref.ref(model)
        self._wholes = [name for name, found in wrappers(model).items() if found.modules_to_save.keys() & self._layers]
        guards.install(model)

    def sidecar_came(self) -> None:
        """One more attention has a side-car."""
        self._sidecars += 1

    def sidecar_left(self) -> None:
        """An attention has lost its side-car; with the last one the model is as it was."""
        self._sidecars -= 1
        if self._sidecars == 0 and self.model is not None:
            guards.remove(self.model)

    def came(self, adapter_name: str) -> None:
        """One more layer has factors of this adapter."""
        self._layers[adapter_name] += 1

    def left(self, adapter_name: str, merged: bool = False) -> None:
        """A layer has lost its factors of an adapter, or only holds them `merged` into the weights from now on.

        With the last layer goes what came with the adapter; with merged weights, what they need stays.
        """
        self._layers[adapter_name] -= 1
        if self._layers[adapter_name] > 0:
            return
        del self._layers[adapter_name]
        for luggage in self._luggage.pop(adapter_name, []):
            if not merged:
                luggage.leave()
        for name in list(self._wholes):
            self._let_go(name, adapter_name, merged)

    def bring(self, adapter_name: str, luggage: Luggage) -> None:
        """Let something leave when the adapter does."""
        self._luggage.setdefault(adapter_name, []).append(luggage)

    def brought(self, adapter_name: str) -> list[Luggage]:
        """What came with an adapter."""
        return list(self._luggage.get(adapter_name, []))

    def activate(self, adapter_names: Iterable[str], inference_mode: bool) -> None:
        """Let the whole modules of these adapters act, and no others.

        Raises ValueError if two of them have one of the same module.
        """
        names = list(adapter_names)
        for wrapper in self._found_wholes():
            own = [name for name in names if name in wrapper.modules_to_save]
            if len(own) > 1:
                raise ValueError(
                    f"Only one of {', '.join(own)} can act at a time: each has its own copy of the same module "
                    "(modules_to_save)."
                )
            wrapper.set_adapter(own, inference_mode=inference_mode)

    def enable(self, enabled: bool) -> None:
        """Let whole modules act at all, or not."""
        for wrapper in self._found_wholes():
            wrapper.enable_adapters(enabled)

    def _found_wholes(self) -> list[ModulesToSaveWrapper]:
        return [self.model.get_submodule(name) for name in self._wholes] if self.model is not None else []

    def _let_go(self, name: str, adapter_name: str, merged: bool) -> None:
        """Drop an adapter's copy of a module; with the last copy the original comes back, or what acts if `merged`."""
        if self.model is None:
            return
        wrapper = self.model.get_submodule(name)
        if adapter_name not in wrapper.modules_to_save:
            return
        if merged and adapter_name in wrapper.active_adapters and not wrapper.disable_adapters:
            wrapper.original_module = wrapper.modules_to_save[adapter_name]
        others = [other for other in wrapper.active_adapters if other != adapter_name]
        wrapper.delete_adapter(adapter_name, others or None)
        if not wrapper.modules_to_save:
            self._wholes.remove(name)
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, wrapper.original_module)

    def __getstate__(self) -> dict:
        # What came along belongs to the pipeline that it came to, and a pickle is of layers, not of their model.
        return {**vars(self), "_home": None, "_luggage": {}}

    def __deepcopy__(self, memo: dict) -> Self:
        twin = type(self)()
        memo[id(self)] = twin
        copied = memo.get(id(self.model)) if self.model is not None else None
        twin._home = weakref.ref(copied) if copied is not None else None
        twin._layers, twin._sidecars, twin._wholes = Counter(self._layers), self._sidecars, list(self._wholes)
        return twin

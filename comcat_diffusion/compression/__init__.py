"""Compression of attention-based vision models: head-level low rank with automatic rank selection.

The names below are looked up when they are first used, so that the settings of `comcat compress` import no torch.
"""

import importlib
import sys
import types

_HOMES = {
    "Plan": "comcat_diffusion.compression.plan",
    "SearchSettings": "comcat_diffusion.compression.rank_search",
    "Settings": "comcat_diffusion.compression.plan",
    "compress": "comcat_diffusion.compression.compress",
    "load_compressed": "comcat_diffusion.compression.store",
    "save_compressed": "comcat_diffusion.compression.store",
    "search_ranks": "comcat_diffusion.compression.rank_search",
}

__all__ = sorted(_HOMES)


class _Package(types.ModuleType):
    """Importing the file compress.py would put a module in the place of the function of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'comcat_diffusion.compression' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

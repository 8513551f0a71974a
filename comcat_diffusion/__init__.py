"""Personalize Stable Diffusion with COMCAT adapters, and compress attention-based vision models.

The names below are looked up when they are first used, so that `import comcat_diffusion` (and `comcat --help`) stays
free of torch.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "ComcatConfig": "comcat_diffusion.adapters.config",
    "ComcatModel": "comcat_diffusion.adapters.model",
    "Notes": "comcat_diffusion.adapters.header",
    "read_adapter": "comcat_diffusion.adapters.header",
    "load_adapter": "comcat_diffusion.adapters.store",
    "save_adapter": "comcat_diffusion.adapters.store",
    "merge_adapters": "comcat_diffusion.adapters.merge",
    "unmerge_adapters": "comcat_diffusion.adapters.merge",
    "unload_adapters": "comcat_diffusion.adapters.merge",
    "listen": "comcat_diffusion.adapters.trigger",
    "remember_prompts": "comcat_diffusion.adapters.trigger",
    "lora_layers": "comcat_diffusion.adapters.as_lora",
    "keep_background": "comcat_diffusion.adapters.focus",
    "set_adapters": "comcat_diffusion.adapters.placing",
    "set_regions": "comcat_diffusion.adapters.regions",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'comcat_diffusion' has no attribute '{name}'")
    if name == "ComcatConfig":
        importlib.import_module("comcat_diffusion.adapters.model")  # a config alone would be unknown to PEFT
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

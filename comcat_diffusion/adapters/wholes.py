"""Modules that an adapter trains as a whole (PEFT's `modules_to_save`): where they are, and what a file holds of them.

PEFT puts a wrapper in the place of such a module, with the original and a copy for each adapter that trains it.
"""

from collections.abc import Mapping

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.parts import plain_modules, plain_name

WHOLE = "whole"  # their tensors in a file are WHOLE.PART.MODULE.WEIGHT


def wrappers(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """PEFT's wrappers by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def whole_tensors(model: nn.Module, part: str, adapter_name: str) -> dict[str, torch.Tensor]:
    """What an adapter has trained whole, as a file names it."""
    copies = _copies(model, part, adapter_name)
    return {f"{mark}.{key}": value for mark, copy in copies.items() for key, value in copy.state_dict().items()}


def fill_wholes(model: nn.Module, part: str, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `whole_tensors`. What is loaded is not trained."""
    if not any(name.startswith(f"{WHOLE}.{part}.") for name in tensors):
        return
    for mark, copy in _copies(model, part, adapter_name).items():
        copy.load_state_dict({key: tensors[f"{mark}.{key}"] for key in copy.state_dict()})
        copy.requires_grad_(False)


def whole_shapes(model: nn.Module, part: str, config: ComcatConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a file of this configuration holds of whole modules of a model."""
    endings = tuple(config.modules_to_save or ())
    if not endings:
        return {}
    chosen = {name: module for name, module in plain_modules(model).items() if name and name.endswith(endings)}
    return {
        f"{WHOLE}.{part}.{name}.{key}": tuple(value.shape)
        for name, module in chosen.items()
        for key, value in module.state_dict().items()
    }


def _copies(model: nn.Module, part: str, adapter_name: str) -> dict[str, nn.Module]:
    return {
        f"{WHOLE}.{part}.{plain_name(name)}": wrapper.modules_to_save[adapter_name]
        for name, wrapper in wrappers(model).items()
        if adapter_name in wrapper.modules_to_save
    }

"""An adapter put into a part of a pipeline beside those that act there already, however the part is wrapped."""

import warnings
from collections.abc import Sequence

from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.model import withdraw
from comcat_diffusion.adapters.parts import bare, components, peft_wrapper
from comcat_diffusion.adapters.peft_type import COMCAT
from comcat_diffusion.adapters.wholes import wrappers


def part_of(pipe: object, part: str) -> nn.Module:
    """A part of a pipeline as the pipeline has it, wrapped or not; a model counts as its U-Net."""
    return pipe if isinstance(pipe, nn.Module) else getattr(pipe, part)


def refuse_wrapper(model: nn.Module) -> None:
    """Raise ValueError if a model is PEFT's, of adapters of another kind, which takes no others beside them."""
    wrapper = peft_wrapper(model)
    if wrapper is not None and wrapper.peft_type != COMCAT:
        raise ValueError(
            f"This {type(bare(model)).__name__} is inside of a PeftModel of {wrapper.peft_type.value}, which takes no "
            "adapter of another kind: unload that one and add it with model.add_adapter or pipe.load_lora_weights."
        )


def active_adapters(model: nn.Module) -> list[str]:
    """The adapters of any kind that act in a model."""
    known = getattr(bare(model), "peft_config", {})
    if not known:
        return []
    layer = next((module for module in bare(model).modules() if isinstance(module, BaseTunerLayer)), None)
    return [name for name in layer.active_adapters if name in known] if layer is not None else []


def add_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Add an adapter that then acts alone: diffusers' verb, also for its models that lack it (PixArt's transformer)."""
    if hasattr(model, "add_adapter"):
        model.add_adapter(config, adapter_name)
    else:
        inject_adapter_in_model(config, model, adapter_name)
        _activate(model, [adapter_name])


def set_adapters(pipe: object, adapter_names: Sequence[str], weights: Sequence[float]) -> None:
    """Let these adapters of a pipeline act, and no others: diffusers' verb, also for its pipelines that lack it.

    Raises ValueError for an adapter that is not loaded.
    """
    if hasattr(pipe, "set_adapters"):
        pipe.set_adapters(list(adapter_names), list(weights))
        return
    parts = {name: model for name, model in components(pipe).items() if getattr(model, "peft_config", None)}
    known = {name for model in parts.values() for name in model.peft_config}
    for name in adapter_names:
        if name not in known:
            raise ValueError(f"There is no adapter '{name}'; loaded: {', '.join(sorted(known)) or 'none'}.")
    for model in parts.values():
        _activate(model, [name for name in adapter_names if name in model.peft_config])
        for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
            for name, weight in zip(adapter_names, weights, strict=True):
                layer.set_scale(name, weight)


def add_active(model: nn.Module, config: ComcatConfig, adapter_name: str) -> None:
    """Add an adapter that acts beside those that do; what was trained before is trained after.

    Raises ValueError as PEFT does, and then the model may have the adapter already: `take_out` mends that.
    """
    base, wrapper, active = bare(model), peft_wrapper(model), active_adapters(model)
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad] if active else []
    with warnings.catch_warnings():  # PEFT warns of every second adapter, diffusers' own way of adding one
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        if wrapper is not None:
            wrapper.add_adapter(adapter_name, config)
        else:
            add_adapter(base, config, adapter_name)
    if active:
        _activate(model, [*active, adapter_name])
        base.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def take_out(model: nn.Module, adapter_name: str, active: list[str]) -> None:
    """Undo `add_active`, however far it came; those that were `active` before are so again."""
    base = bare(model)
    with warnings.catch_warnings():  # PEFT says which adapter it makes the active one; the next line does
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        withdraw(base, adapter_name)
    forget(base, [adapter_name])
    if active:
        _activate(model, active)


def forget(model: nn.Module, adapter_names: list[str]) -> None:
    """Drop the configurations of adapters that a model has no more."""
    configs = getattr(model, "peft_config", {})
    for name in adapter_names:
        configs.pop(name, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        if hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False


def _activate(model: nn.Module, adapter_names: list[str]) -> None:
    wrapper = peft_wrapper(model)
    if wrapper is not None:
        wrapper.base_model.set_adapter(adapter_names)
        return
    for module in bare(model).modules():  # transformers would refuse two names wherever one of them has whole modules
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(adapter_names)
    for wrapper in wrappers(bare(model)).values():  # those of LoRAs, which diffusers would leave switched off
        wrapper.set_adapter([name for name in adapter_names if name in wrapper.modules_to_save])

"""Merging the adapters of a whole pipeline into its weights, taking them out again, and removing every trace."""

from torch import nn

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.layer import ComcatLayer
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.parts import components
from comcat_diffusion.adapters.peft_type import COMCAT
from comcat_diffusion.adapters.regions import set_regions
from comcat_diffusion.adapters.token import take_tokens
from comcat_diffusion.adapters.trigger import stop_listening


def layers_of(pipe: object) -> list[ComcatLayer]:
    """The side-cars of all parts of a pipeline."""
    return [layer for model in components(pipe).values() for layer in adapted_layers(model).values()]


def merge_adapters(pipe: object, adapter_names: list[str] | None = None) -> None:
    """Write adapters (default: the active ones) into the weights: free ones as wider heads, foldable ones in place.

    All or nothing. Raises ValueError if there is nothing to merge, something is merged already, or a projection cannot
    take it (quantized, or wrapped by another adapter).
    """
    layers = layers_of(pipe)
    if any(layer.merged for layer in layers):
        raise ValueError("Adapters are merged already; call unmerge_adapters first.")
    known = {name for layer in layers for name in layer.r}
    unknown = sorted(set(adapter_names or []) - known)
    if unknown or not known:
        raise ValueError(
            f"No adapter {', '.join(unknown) or 'at all'} to merge; loaded: {', '.join(sorted(known)) or 'none'}."
        )
    try:
        for layer in layers:
            layer.merge(safe_merge=True, adapter_names=adapter_names)
    except ValueError:
        for layer in layers:
            layer.unmerge()
        raise


def unmerge_adapters(pipe: object) -> None:
    """Put the very tensors of the base back; the adapters are live again. Raises ValueError if nothing is merged."""
    layers = [layer for layer in layers_of(pipe) if layer.merged]
    if not layers:
        raise ValueError("No adapter is merged, so there is nothing to unmerge.")
    for layer in layers:
        layer.unmerge()


def unload_adapters(pipe: object) -> None:
    """Remove every COMCAT adapter, merged or live, and its new tokens; the base is bit for bit what it was.

    Adapters of other kinds stay.
    """
    set_regions(pipe, {})
    stop_listening(pipe)
    for model in components(pipe).values():
        for name, layer in adapted_layers(model).items():
            layer.unmerge()
            seam.detach(model.get_submodule(name))
        _forget_configs(model)
    take_tokens(pipe)


def bake_adapters(pipe: object) -> None:
    """Merge the active adapters for good: the merged weights stay, every trace of COMCAT goes.

    Raises ValueError as `merge_adapters` does, and then nothing changed.
    """
    merge_adapters(pipe)
    for model in components(pipe).values():
        for name in adapted_layers(model):
            seam.detach(model.get_submodule(name))
        _forget_configs(model)


def _forget_configs(model: nn.Module) -> None:
    configs = getattr(model, "peft_config", {})
    for name in [name for name, config in configs.items() if config.peft_type == COMCAT]:
        del configs[name]
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        model._hf_peft_config_loaded = False

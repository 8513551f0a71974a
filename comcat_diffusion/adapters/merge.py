"""Merging the adapters of a whole pipeline into its weights, taking them out again, and removing every trace."""

from torch import nn

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.merging import merge_all
from comcat_diffusion.adapters.model import side_cars
from comcat_diffusion.adapters.parts import components, inside, peft_wrapper
from comcat_diffusion.adapters.peft_type import COMCAT
from comcat_diffusion.adapters.placing import forget
from comcat_diffusion.adapters.regions import set_regions
from comcat_diffusion.adapters.sidecar import SideCar
from comcat_diffusion.adapters.token import take_tokens
from comcat_diffusion.adapters.trigger import stop_listening


def layers_of(pipe: object) -> list[SideCar]:
    """The side-cars of all parts of a pipeline."""
    return [layer for model in components(pipe).values() for layer in side_cars(model).values()]


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
    merge_all(layers, safe_merge=True, adapter_names=adapter_names)


def unmerge_adapters(pipe: object) -> None:
    """Put the very tensors of the base back; the adapters are live again. Raises ValueError if nothing is merged."""
    layers = [layer for layer in layers_of(pipe) if layer.merged]
    if not layers:
        raise ValueError("No adapter is merged, so there is nothing to unmerge.")
    for layer in layers:
        layer.unmerge()


def unload_adapters(pipe: object) -> None:
    """Remove every COMCAT adapter, merged or live, and its new tokens; the base is bit for bit what it was.

    Adapters of other kinds stay. A part that PEFT's `get_peft_model` wrapped is the pipeline's own again.
    """
    set_regions(pipe, {})
    stop_listening(pipe)
    for part, model in components(pipe).items():
        for layer in side_cars(model).values():
            layer.unmerge()
            seam.detach(layer.owner)
        _forget_ours(model)
        _unwrap(pipe, part)
    take_tokens(pipe)


def bake_adapters(pipe: object) -> None:
    """Merge the active adapters for good: the merged weights stay, every trace of COMCAT goes.

    Raises ValueError as `merge_adapters` does, and then nothing changed.
    """
    merge_adapters(pipe)
    for part, model in components(pipe).items():
        for layer in side_cars(model).values():
            seam.detach(layer.owner)
        _forget_ours(model)
        _unwrap(pipe, part)


def _forget_ours(model: nn.Module) -> None:
    configs = getattr(model, "peft_config", {})
    forget(model, [name for name, config in configs.items() if config.peft_type == COMCAT])


def _unwrap(pipe: object, part: str) -> None:
    """Take a PeftModel without adapters, which cannot run, off a pipeline's part."""
    if not isinstance(pipe, nn.Module):
        wrapper = peft_wrapper(getattr(pipe, part))
        if wrapper is not None and not wrapper.peft_config:
            setattr(pipe, part, inside(wrapper))

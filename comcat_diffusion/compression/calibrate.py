"""What the layers of a model see: moments of their inputs over calibration batches, taken by hooks.

A batch is a dictionary of the model's arguments (labels are left out), or the pictures alone. An argument may be a
dictionary of tensors itself (SDXL's added conditions).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.decompose import watched
from comcat_diffusion.compression.factor import Moments, Narrowing
from comcat_diffusion.memory import give_back

Batch = Mapping[str, torch.Tensor] | torch.Tensor
Seen = dict[str, Moments | Narrowing]  # by path of a Linear


def inputs_of(model: nn.Module, unit: Unit) -> tuple[str, ...]:
    """Paths of the Linears whose input counts: for queries and for the context, or of the one layer."""
    return tuple(path for path, *_ in watched(model, unit))


def calibrate(model: nn.Module, units: Sequence[Unit], batches: Iterable[Batch]) -> Seen:
    """What the Linears see, over all batches. The model runs in evaluation mode and is left as it was.

    Raises ValueError if a batch is no batch of pictures, or if there is none.
    """
    moments: Seen = {}
    handles = []
    for unit in units:
        for path in inputs_of(model, unit):
            if path not in moments:
                layer = model.get_submodule(path)
                moments[path], handle = _watched(layer, unit.product == "linear")
                handles.append(handle)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            for batch in checked(model, batches):
                model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    refuse_unseen(moments)
    give_back()
    return moments


def _watched(layer: nn.Linear, alone: bool) -> tuple[Moments | Narrowing, RemovableHandle]:
    """Where the layer's calls are counted in, and the hook; `alone`: the layer itself is what is truncated."""
    if alone and layer.in_features > layer.out_features:
        seen = Narrowing.zero(layer.in_features, layer.out_features, layer.weight)
        return seen, layer.register_forward_hook(lambda _, arguments, output: seen.add(arguments[0], output))
    seen = Moments.zero(layer.in_features, layer.weight)
    return seen, layer.register_forward_pre_hook(lambda _, arguments: seen.add(arguments[0]))


def checked(model: nn.Module, batches: Iterable[Batch]) -> Iterator[dict[str, torch.Tensor]]:
    """The batches as dictionaries on the model's device and in its precision.

    Raises ValueError if a batch is not what the model takes, holds no pictures, or NaN or infinity.
    """
    parameter = next(model.parameters())
    main = getattr(model, "main_input_name", "sample")
    count = 0
    for count, batch in enumerate(batches, 1):
        named = {main: batch} if isinstance(batch, torch.Tensor) else batch
        if not isinstance(named, Mapping) or main not in named:
            raise ValueError(f"Batch {count} is a {type(batch).__name__}; give tensors, or dictionaries with '{main}'.")
        pictures = named[main]
        if not isinstance(pictures, torch.Tensor) or pictures.ndim != 4 or not pictures.is_floating_point():
            what = (
                f"{pictures.dtype} of shape {tuple(pictures.shape)}" if hasattr(pictures, "shape") else repr(pictures)
            )
            raise ValueError(
                f"'{main}' of batch {count} holds no pictures but {what}; it must be floating point (batch, channels, "
                f"height, width), as the model's image processor makes it."
            )
        bad = [name for name, value in named.items() if not _finite(value)]
        if bad:
            raise ValueError(f"'{bad[0]}' of batch {count} holds NaN or infinity; leave that picture out.")
        yield {n: _like(value, parameter) for n, value in named.items()}
    if not count:
        raise ValueError("There are no batches; give at least one with pictures.")


def _finite(value: torch.Tensor | Mapping) -> bool:
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _like(value: torch.Tensor | Mapping, parameter: torch.Tensor) -> torch.Tensor | dict:
    if isinstance(value, Mapping):
        return {name: _like(part, parameter) for name, part in value.items()}
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)


def refuse_unseen(moments: Seen) -> None:
    """Raises ValueError, naming the layer, if one saw nothing or no numbers."""
    for path, found in moments.items():
        seen = found.inputs if isinstance(found, Narrowing) else found
        if not seen.tokens:
            raise ValueError(f"'{path}' saw nothing on the calibration batches; compress without it or call it there.")
        if not torch.isfinite(seen.square).all():
            raise ValueError(f"The activations into '{path}' are not finite on the calibration batches; use float32.")

"""What diffusers and transformers do with a whole model, made right while it carries adapters: above all saving it.

A model's savers know nothing of side-cars, and its configuration cannot say that heads are wider. So a model that
carries adapters answers some of its verbs through a `Guard`, an attribute of the instance that hides the method of its
class. All go with the last side-car, unless free adapters stay merged.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from diffusers.loaders.lora_base import LoraBaseMixin
from peft.utils import ModulesToSaveWrapper
from torch import nn

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.peft_type import COMCAT

PREFIX = "comcat_"  # of the factors of a layer
_SKIPPED = "_skip_layerwise_casting_patterns"
_WIDER = "comcat_wider"  # an attribute of a projection that a free adapter is merged into


class Guard:
    """One verb of one model, answered by a function that is given the class's own method first."""

    def __init__(self, model: nn.Module, verb: str) -> None:
        self.model, self.verb = model, verb

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own)  # pipelines look which arguments a saver takes

    @property
    def _own(self) -> Callable:
        return getattr(type(self.model), self.verb).__get__(self.model)

    def __deepcopy__(self, memo: dict) -> Self:
        return type(self)(copy.deepcopy(self.model, memo), self.verb)

    def __reduce__(self) -> tuple:
        if any(seam.is_adapted(module) for module in self.model.modules()):
            return Guard, (self.model, self.verb)
        return functools.partial, (getattr(type(self.model), self.verb), self.model)  # a merged model needs none of us

    def __call__(self, *args: object, **kwargs: object) -> object:
        return _ANSWERS[self.verb](self._own, self.model, *args, **kwargs)


def install(model: nn.Module) -> None:
    """Guard the verbs that a model has. Doing it twice does no harm."""
    for verb in _ANSWERS:
        if hasattr(type(model), verb):
            setattr(model, verb, Guard(model, verb))
    # diffusers' layerwise casting to float8 knows LoRA's names and must skip ours as well.
    patterns = tuple(getattr(model, _SKIPPED, None) or ())
    if hasattr(model, _SKIPPED) and PREFIX not in patterns:
        setattr(model, _SKIPPED, (*patterns, PREFIX))


def remove(model: nn.Module) -> None:
    """Undo `install`; where free adapters stay merged, what would break on wider heads stays guarded."""
    if not _wider(model):
        for verb in _ANSWERS:
            vars(model).pop(verb, None)
    patterns = vars(model).get(_SKIPPED)
    if patterns and PREFIX in patterns:
        others = tuple(pattern for pattern in patterns if pattern != PREFIX)
        setattr(model, _SKIPPED, others)
        if others == tuple(getattr(type(model), _SKIPPED) or ()):
            delattr(model, _SKIPPED)


def mark_wider(query: nn.Module) -> None:
    """Note that this projection into queries is wider than the base's configuration says."""
    setattr(query, _WIDER, True)


def _wider(model: nn.Module) -> list[str]:
    """The attentions of a model that free adapters are merged into."""
    return [name.rpartition(".")[0] for name, module in model.named_modules() if hasattr(module, _WIDER)]


def _save_base(own: Callable, model: nn.Module, *args: object, **kwargs: object) -> object:
    """`save_pretrained` writes the base, and foldable adapters that are merged into it."""
    if _wider(model):
        raise ValueError(
            "A free adapter is merged into this model, whose heads are wider than its configuration can say: nothing "
            "could load the files. Unmerge it (unmerge_adapters) and save it beside the base with save_adapter, or "
            "train it again with foldable=True, which merges in the base's own shapes."
        )
    loaded = "_hf_peft_config_loaded"
    others = any(config.peft_type != COMCAT for config in getattr(model, "peft_config", {}).values())
    if vars(model).get(loaded) and hasattr(model, "get_adapter_state_dict"):
        # A transformers model writes its adapters, without its base; a pipeline asks all its parts for themselves.
        if others or kwargs.get("save_peft_format", True):
            return own(*args, **kwargs)
        setattr(model, loaded, False)
        try:
            with _without_adapters(model):
                return own(*args, **kwargs)
        finally:
            setattr(model, loaded, True)
    with _without_adapters(model):
        return own(*args, **kwargs)


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """In this block a model's state dict is that of its base."""
    copied = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]

    def strip(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
        for key in list(state):
            value = state.pop(key)
            for name in copied:
                if key.startswith(f"{name}.modules_to_save."):
                    break
                key = key.replace(f"{name}.original_module.", f"{name}.", 1)
            else:
                if f".{seam.SIDECAR}.{PREFIX}" not in key:
                    state[key] = value

    hook = model.register_state_dict_post_hook(strip)
    try:
        yield
    finally:
        hook.remove()


def _save_as_lora(own: Callable, model: nn.Module, *args: object, **kwargs: object) -> object:
    """`save_lora_adapter` writes a foldable adapter as the LoRA that it is, exactly. Raises ValueError for others."""
    given = inspect.signature(own).bind(*args, **kwargs)
    given.apply_defaults()
    asked = given.arguments
    config = getattr(model, "peft_config", {}).get(asked["adapter_name"])
    if getattr(config, "peft_type", None) != COMCAT:
        return own(*args, **kwargs)
    from comcat_diffusion.adapters.as_lora import lora_layers  # which stands on the layers that are guarded here

    layers = lora_layers(model, asked["adapter_name"])
    if asked["upcast_before_saving"]:
        layers = {name: values.float() for name, values in layers.items()}
    return LoraBaseMixin.write_lora_layers(
        layers, asked["save_directory"], True, asked["weight_name"], None, asked["safe_serialization"]
    )


def _load_pictures(own: Callable, model: nn.Module, *args: object, **kwargs: object) -> object:
    """An IP-Adapter, before anything of it is in the model."""
    _refuse_wide_texts(model)
    return own(*args, **kwargs)


def _set_processor(own: Callable, model: nn.Module, processor: object, *args: object, **kwargs: object) -> object:
    """An IP-Adapter's processors, by hand."""
    given = processor.values() if isinstance(processor, dict) else [processor]
    if any(hasattr(one, "to_k_ip") for one in given):
        _refuse_wide_texts(model)
    return own(processor, *args, **kwargs)


def _refuse_wide_texts(model: nn.Module) -> None:
    if any(seam.is_cross_attention(model.get_submodule(name)) for name in _wider(model)):
        raise ValueError(
            "A free adapter is merged into this model, whose cross-attentions are wider than an IP-Adapter's keys and "
            "values: keep it live (unmerge_adapters), where both work, or merge a foldable one."
        )


_ANSWERS = {
    "save_pretrained": _save_base,
    "save_lora_adapter": _save_as_lora,
    "set_attn_processor": _set_processor,
    "_load_ip_adapter_weights": _load_pictures,
}


def guard_lora_files() -> None:
    """Let `save_lora_weights` refuse factors of a COMCAT adapter, of which it would write a file that nothing loads.

    A class method that is handed a plain dictionary: the class is the only place where it can be told.
    """
    pack = LoraBaseMixin.pack_weights
    if hasattr(pack, "__wrapped__"):
        return

    @functools.wraps(pack)
    def pack_weights(layers: nn.Module | dict, prefix: str) -> dict:
        packed = pack(layers, prefix)
        if any(f".{seam.SIDECAR}.{PREFIX}" in name for name in packed):
            raise ValueError(
                "These are the factors of a COMCAT adapter, which save_lora_weights would write as a LoRA that nothing "
                "loads: give it comcat_diffusion.lora_layers(model, name) of a foldable one, or write any with "
                "comcat_diffusion.save_adapter(pipe, path, name)."
            )
        return packed

    LoraBaseMixin.pack_weights = staticmethod(pack_weights)

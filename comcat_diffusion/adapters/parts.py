"""The parts of a pipeline that can be adapted, below what torch.compile and PEFT wrap around them and their modules."""

import re

from peft import PeftModel
from torch import nn
from torch._dynamo import OptimizedModule

from comcat_diffusion.families.known import part_of_denoiser

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_WRAPPED = re.compile(r"(^|\.)(_orig_mod|original_module)(?=\.|$)")  # by torch.compile; by PEFT's modules_to_save
_TRAINED = ".modules_to_save."  # a copy of a module, beside the original


def components(pipe: object) -> dict[str, nn.Module]:
    """The adaptable parts of a pipeline by name, unwrapped; a bare model counts as its denoiser."""
    if isinstance(pipe, nn.Module):
        return {part_of_denoiser(type(bare(pipe)).__name__): bare(pipe)}
    return {name: bare(getattr(pipe, name)) for name in COMPONENTS if getattr(pipe, name, None) is not None}


def denoiser(pipe: object) -> nn.Module:
    """The U-Net or transformer of a pipeline: the part that identifies the base."""
    parts = components(pipe)
    return parts.get("unet", parts.get("transformer"))


def bare(model: nn.Module) -> nn.Module:
    """The model inside of `torch.compile(model)` and of PEFT's `get_peft_model(model, config)`."""
    while isinstance(model, (OptimizedModule, PeftModel)):
        model = inside(model)
    return model


def inside(model: nn.Module) -> nn.Module:
    """What one wrapper of `bare` is around."""
    if isinstance(model, OptimizedModule):
        return model._orig_mod
    return getattr(model.base_model, "model", model.base_model)  # prompt learning has no tuner in between


def peft_wrapper(model: nn.Module) -> PeftModel | None:
    """The PeftModel around a model, if there is one."""
    while isinstance(model, OptimizedModule):
        model = inside(model)
    return model if isinstance(model, PeftModel) else None


def plain_name(name: str) -> str:
    """A module's name as it is in a model of which nothing is wrapped."""
    wrapped = "_orig_mod" in name or "original_module" in name  # an expression takes as long for those that are not
    return _WRAPPED.sub("", name).removeprefix(".") if wrapped else name


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by the names that they have where nothing is wrapped; of a wrapper what is inside."""
    return {plain_name(name): module for name, module in model.named_modules() if _TRAINED not in f"{name}."}

"""The parts of a pipeline that can be adapted."""

from torch import nn

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def components(pipe: object) -> dict[str, nn.Module]:
    """The adaptable parts of a pipeline by name; a bare model counts as its U-Net."""
    if isinstance(pipe, nn.Module):
        return {"unet": pipe}
    return {name: getattr(pipe, name) for name in COMPONENTS if getattr(pipe, name, None) is not None}


def denoiser(pipe: object) -> nn.Module:
    """The U-Net or transformer of a pipeline: the part that identifies the base."""
    parts = components(pipe)
    return parts.get("unet", parts.get("transformer"))

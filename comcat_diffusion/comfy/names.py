"""A model of ComfyUI seen as diffusers names its parts, found by structure: its attentions are the very same modules.

The original code counts all blocks of a U-Net one by one, diffusers by level; where a level ends, the block that comes
next halves (`op`) or doubles (`conv`) the picture.
"""

import re
from collections.abc import Iterable

import torch
from torch import nn

from comcat_diffusion.adapters.fingerprint import fingerprint_as
from comcat_diffusion.comfy.quantized import Quantized, is_ordinary, linear_of, rough

PREDICTIONS = {"EPS": "epsilon", "V_PREDICTION": "v_prediction"}  # as ComfyUI calls them; others by their own names
ENCODERS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}  # its names of ours
_UNREAD = {"clip_h": 1}  # last layers of which nobody reads the states; diffusers' copies of 2.x come without them
_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.1\.(transformer_blocks\.\d+\.attn[12])")
_MIDDLE = re.compile(r"middle_block\.1\.(transformer_blocks\.\d+\.attn[12])")
_CONVOLUTION = re.compile(
    r"(?:(input_blocks|output_blocks)\.(\d+)\.0|middle_block\.([02]))\.(in_layers\.2|out_layers\.3)"
)
_CALLED = {"in_layers.2": "conv1", "out_layers.3": "conv2"}  # what diffusers calls the two of a residual block
_PLACES = ("down_blocks", "up_blocks", "mid_block")  # the order in which diffusers makes a U-Net


class Attention(nn.Module):
    """One attention with the attributes of diffusers'; its projections are those of the other, not copies.

    Keys and values have the weights that they had without LoRAs.
    """

    def __init__(self, attention: nn.Module, crossed: bool, keys: nn.Module, values: nn.Module) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = attention.to_q, keys, values
        self.to_out, self.heads = attention.to_out, attention.heads
        self.is_cross_attention, self.scale_qk = crossed, True


class TextAttention(nn.Module):
    """The same of a text encoder, with the attributes of transformers'."""

    def __init__(self, attention: nn.Module, keys: nn.Module, values: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, keys, values
        self.out_proj, self.num_heads = attention.out_proj, attention.heads


def unet_names(unet: nn.Module) -> dict[str, str]:
    """Name in ComfyUI by name in diffusers, of every attention of a U-Net, in diffusers' order."""
    modules = dict(unet.named_modules())
    found = {}
    for name in modules:
        block, middle = _BLOCK.fullmatch(name), _MIDDLE.fullmatch(name)
        if middle:
            found[f"mid_block.attentions.0.{middle[1]}"] = name
        elif block:
            down, number = block[1] == "input_blocks", int(block[2])
            level, place = _level(modules, block[1], number)
            found[f"{'down' if down else 'up'}_blocks.{level}.attentions.{place}.{block[3]}"] = name
    return dict(sorted(found.items(), key=lambda pair: _PLACES.index(pair[0].partition(".")[0])))  # sorted is stable


def convolution_names(unet: nn.Module) -> dict[str, str]:
    """The same of the convolutions of its residual blocks."""
    modules, found = dict(unet.named_modules()), {}
    for name, match in ((name, _CONVOLUTION.fullmatch(name)) for name in modules):
        if match:
            side, number, middle, own = match.groups()
            down = side == "input_blocks"
            level, place = (0, int(middle) // 2) if middle else _level(modules, side, int(number))
            block = "mid_block" if middle else f"{'down' if down else 'up'}_blocks.{level}"
            found[f"{block}.resnets.{place}.{_CALLED[own]}"] = name
    return found


def _level(modules: dict[str, nn.Module], side: str, number: int) -> tuple[int, int]:
    """Of block `number`: the level, and the place within it."""
    if side == "input_blocks":  # the first one reads the picture, and one that halves it stands between two levels
        ends = [n for n in range(number) if f"{side}.{n}.0.op" in modules]
        return len(ends), number - (ends[-1] if ends else 0) - 1
    ends = [n for n in range(number) if any(f"{side}.{n}.{place}.conv" in modules for place in (1, 2))]
    return len(ends), number - (ends[-1] + 1 if ends else 0)


def unet_as_diffusers(patcher: object) -> nn.Module:
    """The attentions of a `ModelPatcher`'s U-Net under diffusers' names, keys and values as they are without LoRAs.

    Convolutions are there by their shapes alone. Raises ValueError for a model without attentions that are known.
    """
    unet = patcher.model.diffusion_model
    names = unet_names(unet)
    if not names:
        raise ValueError(
            f"This model ({type(unet).__name__}) is no U-Net of Stable Diffusion 1.x, 2.x or XL, nor a transformer of "
            "a kind for which COMCAT adapters are read here."
        )
    modules, found = dict(unet.named_modules()), {}
    for own, name in names.items():
        kept = [_linear(patcher, f"diffusion_model.{name}.{projection}") for projection in ("to_k", "to_v")]
        found[own] = Attention(modules[name], own.endswith("attn2"), *kept)
    return tree(found | {own: _shape_of(modules[name]) for own, name in convolution_names(unet).items()})


def _shape_of(host: nn.Conv2d) -> nn.Conv2d:
    into, out = host.in_channels, host.out_channels
    return nn.Conv2d(into, out, host.kernel_size, host.stride, host.padding, device="meta")


def kept_weight(patcher: object, name: str) -> torch.Tensor | None:
    """The weight that a Linear of a `ModelPatcher`'s model has without LoRAs, if there are some in it.

    While a model is loaded, ComfyUI keeps LoRAs in its weights, and the weights that were there in `backup`.
    """
    backup = patcher.backup if hasattr(patcher, "backup") else patcher.model.lora_loader.backup  # ComfyUI's, Forge's
    kept = backup.get(f"{name}.weight")
    return getattr(kept, "weight", kept)


def weight_of(patcher: object, name: str) -> torch.Tensor | Quantized:
    """The weight (out, in) of a Linear of a `ModelPatcher`'s model as it is without LoRAs."""
    module, kept = patcher.model.get_submodule(name), kept_weight(patcher, name)
    found = module.weight if kept is None else kept
    return found if is_ordinary(found) else Quantized.of(module, found)


def _linear(patcher: object, name: str) -> nn.Linear:
    return linear_of(weight_of(patcher, name))


def roughness(patcher: object, attentions: Iterable[str]) -> float:
    """How far weights of these attentions of a `ModelPatcher`'s model may be rounded, as `rounded` takes it."""
    modules = (module for name in attentions for module in patcher.model.get_submodule(name).modules())
    weights = (getattr(module, "weight", None) for module in modules)
    return max((rough(weight) for weight in weights if weight is not None and weight.ndim == 2), default=0.0)


def text_names(encoder: nn.Module, kind: str, within: str = "") -> dict[str, str]:
    """Name in ComfyUI by name in transformers, of every attention of a text encoder.

    `kind` is as in ENCODERS; transformers' names begin with `within`.
    """
    names = [
        name for name, module in encoder.named_modules() if name.endswith("self_attn") and hasattr(module, "q_proj")
    ]
    read = len(names) - _UNREAD.get(kind, 0)
    return {f"{within}{name[name.index('encoder.layers.') :]}": name for name in names[:read]}


def text_as_transformers(patcher: object, root: str, within: str = "") -> nn.Module:
    """The attentions of a text encoder, `root` in a `ModelPatcher`'s model, under transformers' names."""
    encoder, found = patcher.model.get_submodule(root), {}
    for own, name in text_names(encoder, root.partition(".")[0], within).items():
        kept = [_linear(patcher, f"{root}.{name}.{projection}") for projection in ("k_proj", "v_proj")]
        found[own] = TextAttention(encoder.get_submodule(name), *kept)
    return tree(found)


def tree(leaves: dict[str, nn.Module], root: nn.Module | None = None) -> nn.Module:
    """Modules by their names, under one that holds them all."""
    root = nn.Module() if root is None else root
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        here = root
        for step in path:
            if step not in here._modules:
                here.add_module(step, nn.Module())
            here = here._modules[step]
        here.add_module(last, leaf)
    return root


def prediction_of(patcher: object) -> str:
    """What a model predicts, as diffusers calls it: its own kind, or what a sampling node has made of it."""
    if hasattr(patcher.model, "predictor"):  # Forge's, which calls it as diffusers does
        return patcher.model.predictor.prediction_type
    sampling = patcher.object_patches.get("model_sampling")
    kinds = {kind.__name__ for kind in type(sampling).__mro__}
    name = next((name for name in ("V_PREDICTION", "EPS") if name in kinds), patcher.model.model_type.name)
    return PREDICTIONS.get(name, name)


def fingerprint_of(shell: nn.Module, prediction: str) -> dict:
    """What identifies a U-Net, seen as diffusers names it, so that it compares with that of an adapter's base."""
    crossed = [module for module in shell.modules() if getattr(module, "is_cross_attention", False)]
    width = crossed[0].to_k.in_features if crossed else None
    return fingerprint_as("UNet2DConditionModel", width, shell, prediction)

"""Tiny classifiers that compression is tested on, with biases that matter, and batches for them."""

import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

CLASSES = 5


def _sizes(**more) -> dict:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    return sizes | {"num_attention_heads": 3, "initializer_range": 0.2, "num_labels": CLASSES} | more


def built(kind: str = "vit", seed: int = 0, **more) -> nn.Module:
    """A tiny model of random weights in float64; `kind` is vit, vit-nobias, deit, deit-nobias, clip,
    siglip, beit (with relative positions), dinov2, dinov2-swiglu or registers."""
    family, _, plain = kind.partition("-")
    classes = {
        "vit": (ViTConfig, ViTForImageClassification),
        "deit": (DeiTConfig, DeiTForImageClassificationWithTeacher),
        "clip": (CLIPVisionConfig, CLIPVisionModel),
        "beit": (BeitConfig, BeitModel),
        "siglip": (SiglipVisionConfig, SiglipVisionModel),
        "dinov2": (Dinov2Config, Dinov2Model),
        "registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    }
    config, model = classes[family]
    if family in ("vit", "deit"):
        more = {"qkv_bias": plain != "nobias"} | more
    if family == "beit":
        more = {"use_relative_position_bias": True, "layer_scale_init_value": 0.5} | more
    if family in ("dinov2", "registers"):
        more = {"mlp_ratio": 2, "layerscale_value": 0.5, "use_swiglu_ffn": plain == "swiglu"} | more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model(config(**_sizes(**more))).eval()
        for name, parameter in made.named_parameters():
            if name.endswith("bias") or "token" in name or "position" in name:
                nn.init.normal_(parameter, std=0.3)
    return made.double()


def pictures(count: int = 8, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(count, 3, 8, 8), correlated like pictures are, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    fine = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    return (nn.functional.interpolate(coarse, scale_factor=2) + 0.1 * fine + 0.5).to(dtype)


def batches(count: int = 4, size: int = 8, labels: bool = False, dtype: torch.dtype = torch.float64) -> list[dict]:
    """Different pictures in every batch; labels by chance."""
    made = [{"pixel_values": pictures(size, seed=10 + number, dtype=dtype)} for number in range(count)]
    for number, batch in enumerate(made):
        if labels:
            generator = torch.Generator().manual_seed(number)
            batch["labels"] = torch.randint(CLASSES, (size,), generator=generator)
    return made


def out(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The first output, without gradients."""
    with torch.no_grad():
        return model(inputs)[0]

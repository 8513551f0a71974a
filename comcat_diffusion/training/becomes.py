"""What an adapter that is going to be trained can become, and how large: known before the first step."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from comcat_diffusion.adapters.separable import TAPS
from comcat_diffusion.adapters.store import expected_shapes
from comcat_diffusion.bases import PRECISIONS
from comcat_diffusion.families.family import Family, Native
from comcat_diffusion.families.known import family_of_denoiser, family_of_model
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.learned import adapter_config, convolutions, targets

SHRUNK, LEAST, MOST = 20, 10_000, 1_000_000  # a file is this part of what is learned, within these bytes
Shapes = Mapping[str, tuple[int, int]]  # of factors by name, ATTENTION.FACTOR


def budget(config: TrainConfig, denoiser: nn.Module) -> int:
    """The most bytes that the file is to have; 0: as many as all that is learned takes. See --max_bytes."""
    if config.max_bytes is not None:
        return config.max_bytes
    if config.kind != "free" or config.everywhere or config.thumbnail or config.init_adapter:
        return 0
    if convolutions(config, denoiser):  # another form of an adapter of all attentions, of as many bytes
        config = replace(config, convolutions=0, target_modules=None)
    config = replace(config, feed_forwards=0)
    return min(MOST, max(LEAST, _whole(config, denoiser) // SHRUNK))


def _whole(config: TrainConfig, denoiser: nn.Module) -> int:
    """Bytes of all that is learned of a denoiser, without the header."""
    shapes = expected_shapes(denoiser, adapter_config(config, denoiser, ["a word"])).values()
    return sum(high * wide for high, wide in shapes) * PRECISIONS[config.save_precision].itemsize


def becomes(config: TrainConfig, denoiser: nn.Module) -> str:
    """Where the adapter will work, in a sentence. A denoiser without weights, on the meta device, will do."""
    shape, most = adapter_config(config, denoiser, ["a word"]), budget(config, denoiser)
    size = f"{most / 1000:,.0f} kB at most" if most else f"{_whole(config, denoiser) / 1000:,.0f} kB"
    family = family_of_denoiser(type(denoiser).__name__, denoiser.config)
    if family is None:  # see export/fit.py
        return f"This adapter is for this tool (about {size})."
    tools = "this tool and its ComfyUI node" if family.has_node else "this tool"
    kept = shape if config.feed_forwards or _with_convolutions(config, denoiser) else shape.at_attentions()
    exact = replace(kept, tied=False, cores=False, foldable=True, target_modules=targets(config, denoiser))
    lora = expected_shapes(denoiser, exact)
    larger = f"{lora_bytes(lora, config.rank, family) / 1000:,.0f} kB"
    if config.kind == "free":
        return (
            f"This adapter is for {tools} (about {size}). For a LoRA that every program reads "
            f"(about {larger}), say --as lora."
        )
    if config.everywhere:
        return f"comcat export makes it, exactly, a LoRA that every program reads (at most {larger}, half in fp16)."
    return (
        f"This adapter is for {tools} (about {size}); nothing else changes. For a LoRA that "
        f"every program reads (about {larger}, half in fp16), which changes other prompts too, say --as lora."
    )


def _with_convolutions(config: TrainConfig, denoiser: nn.Module) -> bool:
    """Whether the same settings with --as lora have terms beside convolutions: those asked for, or usual then."""
    family = family_of_model(denoiser)
    if config.convolutions in (None, family.usual_convolutions(config.kind)):
        return bool(family.usual_convolutions("foldable"))
    return bool(config.convolutions)


def lora_bytes(foldable: Shapes, rank: int, family: Family) -> int:
    """Bytes in float32 of the LoRA that a foldable adapter with factors of these shapes becomes, without its header.

    (H*R, C) and (H*R, D) become `down` (H*R, C) and `up` (H*D, H*R), see export/lora.py; beside convolutions (R, C),
    (R, 9) and (O, R) become (R, C, 3, 3) and (O, R, 1, 1), and beside Linears (R, C) and (O, R) stay so.
    """
    count = 0
    for name, (rows, width) in foldable.items():
        if name.endswith(".conv_down"):
            count += rows * width * TAPS
        if name.endswith((".conv_up", ".feed_down")):
            count += rows * width
        if name.endswith(".feed_up"):
            count += rows * width * _height(family.native_weight(name.removesuffix(".feed_up")))
        if name.endswith(".q_core"):
            attention = name.removesuffix(".q_core")
            columns = foldable[f"{attention}.k_down"][1]
            fused = _height(family.native_weight(f"{attention}.{family.lora_projections(attention)[0]}"))
            count += 2 * rows * (columns + fused * rows // rank * width)  # of keys and of values
    return 4 * round(count)


def _height(native: Native | None) -> float:
    """Of a weight, by that of a projection in it: a fused Linear's `up` has rows for its other projections too."""
    return native.count / native.span if native else 1

"""A transformer of ComfyUI seen as diffusers names its parts, found by structure: the weights are the very same.

ComfyUI keeps what the original code has, mostly queries, keys and values in one Linear; diffusers' are its rows.

Letters: H heads, D head width, C channels.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from comcat_diffusion.comfy.names import tree, weight_of
from comcat_diffusion.comfy.quantized import Quantized, linear_of
from comcat_diffusion.families.family import Family, Native
from comcat_diffusion.families.known import family_of_denoiser

_UNET = "diffusion_model"
Weights = Callable[[str], torch.Tensor | Quantized]  # of a Linear by its name, as it is without LoRAs
_NUMBER = re.compile(r"\d+")


class Projections(nn.Module):
    """One attention with the attributes of diffusers', whose projections are of another's weights, not copies."""

    def __init__(self, heads: int, processor: str, linears: Mapping[str, torch.Tensor | Quantized]) -> None:
        super().__init__()
        self.heads, self.scale_qk = heads, True
        self.processor = type(processor, (), {})()
        for name, own in linears.items():
            *parents, last = name.split(".")
            here = self
            for parent in parents:
                here.add_module(parent, nn.Module())
                here = here._modules[parent]
            here.add_module(last, linear_of(own))


@dataclass(frozen=True)
class Kind:
    """A kind of transformer: what diffusers calls it, and where its attentions are."""

    denoiser: str  # class in diffusers
    mark: str  # a part that it has and others have not
    places: tuple[tuple[str, str], ...]  # (diffusers' name, ComfyUI's) of attentions; N stands for a number
    seen: Callable[[nn.Module, Weights, str], Projections]  # an attention, its weights, and its name in ComfyUI
    lacks: str = ""  # a part that it has not and others like it have
    fed: tuple[tuple[str, str], ...] = ()  # the same as `places` of the Linears of feed-forwards; see adapters/fed.py

    @property
    def family(self) -> Family:
        """Whose it is."""
        return family_of_denoiser(self.denoiser, {})


def kind_of(transformer: nn.Module) -> Kind | None:
    """The kind of a transformer, or None if it is of none that is known."""
    has = lambda name: not name or _found(transformer, name) is not None  # noqa: E731
    return next((kind for kind in KINDS if has(kind.mark) and not (kind.lacks and has(kind.lacks))), None)


def attention_names(transformer: nn.Module, kind: Kind) -> dict[str, str]:
    """Name in ComfyUI by name in diffusers, of every attention, in diffusers' order."""
    return dict(sorted(_named(transformer, kind.places).items(), key=lambda pair: _order(pair[0], kind)))


def feed_forward_names(transformer: nn.Module, kind: Kind) -> dict[str, str]:
    """The same of the Linears of feed-forwards that terms can stand beside, some of which are rows of one here."""
    return _named(transformer, kind.fed)


def _named(transformer: nn.Module, places: Sequence[tuple[str, str]]) -> dict[str, str]:
    modules, found = dict(transformer.named_modules()), {}
    for place, name in places:
        pattern = re.compile(re.escape(name).replace("N", r"(\d+)"))
        for theirs in modules:
            match = pattern.fullmatch(theirs)
            if match and modules[theirs] is not None:
                found[place.replace("N", match[1])] = theirs
    return found


def as_diffusers(patcher: object, kind: Kind) -> nn.Module:
    """The attentions of a `ModelPatcher`'s transformer under diffusers' names, as they are without LoRAs.

    Linears of feed-forwards are there by their shapes alone.
    """
    transformer = patcher.model.diffusion_model

    def weight(name: str) -> torch.Tensor | Quantized:
        return weight_of(patcher, f"{_UNET}.{name}")

    names = attention_names(transformer, kind)
    shell = type(kind.denoiser, (nn.Module,), {})()  # by whose class its family is known
    shell = tree({own: kind.seen(transformer.get_submodule(name), weight, name) for own, name in names.items()}, shell)
    there = dict(shell.named_modules())
    fed = {own: name for own, name in feed_forward_names(transformer, kind).items() if own not in there}
    native = kind.family.native_weight
    return tree({own: _shape_of(weight(name).shape, native(own)) for own, name in fed.items()}, shell)


def _shape_of(shape: tuple[int, int], native: Native | None) -> nn.Linear:
    """A Linear of the shape of a weight (O, C), or of its rows there."""
    rows = shape[0] * native.span // native.count if native else shape[0]
    return nn.Linear(shape[1], rows, bias=False, device="meta")


def _order(name: str, kind: Kind) -> tuple:
    """Diffusers' order: list after list of blocks, block after block."""
    place = _NUMBER.sub("N", name, count=1)
    lists = list(dict.fromkeys(own.partition(".N.")[0] for own, _ in kind.places))
    within = [own for own, _ in kind.places].index(place)
    return lists.index(place.partition(".N.")[0]), int(_NUMBER.search(name)[0]), within


def _found(transformer: nn.Module, name: str) -> nn.Module | None:
    try:
        return transformer.get_submodule(name)
    except AttributeError:
        return None


# Attentions of each kind


def _flux_double(weight: Weights, name: str) -> dict[str, torch.Tensor | Quantized]:
    picture, text = (weight(f"{name}.{side}_attn.qkv").chunk(3) for side in ("img", "txt"))
    linears = dict(zip(("to_q", "to_k", "to_v"), picture, strict=True))
    linears |= dict(zip(("add_q_proj", "add_k_proj", "add_v_proj"), text, strict=True))
    return linears | {"to_out.0": weight(f"{name}.img_attn.proj")}


def _flux_2(block: nn.Module, weight: Weights, name: str) -> Projections:
    if name.startswith("double"):
        return Projections(block.num_heads, "Flux2AttnProcessor", _flux_double(weight, name))
    linears = {"to_qkv_mlp_proj": weight(f"{name}.linear1"), "to_out": weight(f"{name}.linear2")}
    return Projections(block.num_heads, "Flux2ParallelSelfAttnProcessor", linears)


def _flux_1(block: nn.Module, weight: Weights, name: str) -> Projections:
    if name.startswith("double"):
        return Projections(block.num_heads, "FluxAttnProcessor", _flux_double(weight, name))
    parts = weight(f"{name}.linear1")[: 3 * block.hidden_size].chunk(3)
    made = Projections(block.num_heads, "FluxAttnProcessor", dict(zip(("to_q", "to_k", "to_v"), parts, strict=True)))
    made.pre_only = True
    return made


def _mmdit(attention: nn.Module, weight: Weights, name: str) -> Projections:
    own = dict(zip(("q", "k", "v"), weight(f"{name}.qkv").chunk(3), strict=True))
    if name.endswith("attn2"):
        linears = {f"to_{letter}": part for letter, part in own.items()} | {"to_out.0": weight(f"{name}.proj")}
        return Projections(attention.num_heads, "JointAttnProcessor2_0", linears)
    beside = name.replace("context_block", "x_block")
    picture = weight(f"{beside}.qkv").chunk(3)
    linears = dict(zip(("to_q", "to_k", "to_v"), picture, strict=True))
    linears |= {f"add_{letter}_proj": part for letter, part in own.items()}
    linears["to_out.0"] = weight(f"{beside}.proj")
    return Projections(attention.num_heads, "JointAttnProcessor2_0", linears)


def _z_image(attention: nn.Module, weight: Weights, name: str) -> Projections:
    linears = dict(zip(("to_q", "to_k", "to_v"), weight(f"{name}.qkv").chunk(3), strict=True))
    linears["to_out.0"] = weight(f"{name}.out")
    return Projections(attention.n_local_heads, "ZSingleStreamAttnProcessor", linears)


def _qwen_image(attention: nn.Module, weight: Weights, name: str) -> Projections:
    own = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0")
    linears = {linear: weight(f"{name}.{linear}") for linear in own}
    return Projections(attention.heads, "QwenDoubleStreamAttnProcessor2_0", linears)


_DOUBLE = ("transformer_blocks.N.attn", "double_blocks.N")
_SINGLE = ("single_transformer_blocks.N.attn", "single_blocks.N")

_FED_FLUX_2 = (
    ("single_transformer_blocks.N.attn.to_qkv_mlp_proj", "single_blocks.N.linear1"),
    ("single_transformer_blocks.N.attn.to_out", "single_blocks.N.linear2"),
)
_FED_FLUX_1 = (
    ("single_transformer_blocks.N.proj_mlp", "single_blocks.N.linear1"),
    ("single_transformer_blocks.N.proj_out", "single_blocks.N.linear2"),
)

KINDS = (
    Kind("Flux2Transformer2DModel", "double_stream_modulation_img", (_DOUBLE, _SINGLE), _flux_2, fed=_FED_FLUX_2),
    Kind(
        "FluxTransformer2DModel",
        "double_blocks.0.img_mod",
        (_DOUBLE, _SINGLE),
        _flux_1,
        lacks="distilled_guidance_layer",
        fed=_FED_FLUX_1,
    ),
    # Radiance, which draws pixels, has the same blocks.
    Kind(
        "ChromaTransformer2DModel",
        "distilled_guidance_layer",
        (_DOUBLE, _SINGLE),
        _flux_1,
        lacks="nerf_blocks",
        fed=_FED_FLUX_1,
    ),
    # Lumina 2, which it was made of, has a SiLU before its modulations.
    Kind(
        "ZImageTransformer2DModel",
        "noise_refiner.0.attention",
        tuple((f"{blocks}.N.attention",) * 2 for blocks in ("noise_refiner", "context_refiner", "layers")),
        _z_image,
        lacks="layers.0.adaLN_modulation.1",
        fed=tuple((f"layers.N.feed_forward.w{number}",) * 2 for number in (1, 2, 3)),
    ),
    Kind(
        "QwenImageTransformer2DModel",
        "transformer_blocks.0.txt_mod",
        (("transformer_blocks.N.attn",) * 2,),
        _qwen_image,
        fed=tuple((f"transformer_blocks.N.img_mlp.net.{own}",) * 2 for own in ("0.proj", "2")),
    ),
    Kind(
        "SD3Transformer2DModel",
        "joint_blocks.0.context_block.attn",
        (
            ("transformer_blocks.N.attn", "joint_blocks.N.context_block.attn"),
            ("transformer_blocks.N.attn2", "joint_blocks.N.x_block.attn2"),
        ),
        _mmdit,
        fed=(
            ("transformer_blocks.N.ff.net.0.proj", "joint_blocks.N.x_block.mlp.fc1"),
            ("transformer_blocks.N.ff.net.2", "joint_blocks.N.x_block.mlp.fc2"),
        ),
    ),
)

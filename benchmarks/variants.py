"""What is compared: a base's U-Net, or one attention of it, with random weights, bare or with one kind of adapter.

Letters: B batch, N tokens, M context tokens, H heads, D head width, R rank, C channels.
"""

import copy
import re
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.attentions import DIFFUSERS
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.learned import adapter_config

CONTEXT_TOKENS = 77
NAME = "bench"  # of every adapter here
# What is adapted, as patterns of names; `cross` is what `comcat train` adapts without flags, `up` its up blocks alone.
ATTENTIONS = {"self+cross": r".*\.attn[12]", "cross": r".*\.attn2", "up": r"up_blocks\..*\.attn2"}
FACTORS = ("q_down", "k_down", "v_down", "out_up")
RECIPE_RATE, RECIPE_SCHEDULE = 5e-4, "constant"  # of diffusers' DreamBooth-LoRA script by default


@dataclass(frozen=True)
class Base:
    """An architecture of Stable Diffusion, and the attentions of its largest resolution."""

    name: str
    unet: dict[str, object]  # what diffusers' U-Net is made from
    channels: int
    heads: int
    pixels: int  # of the picture, along the side of a token

    def small(self) -> "Base":
        """The same blocks, twenty times narrower: for tests of the benchmark, not of speed."""
        narrow = {"block_out_channels": tuple(width // 20 for width in self.unet["block_out_channels"])}
        narrow |= {"norm_num_groups": 8, "cross_attention_dim": 32, "attention_head_dim": 2}
        return replace(self, unet=self.unet | narrow, channels=self.channels // 20, heads=2)


BASES = {
    "sd15": Base(
        "SD 1.5",
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        channels=320,
        heads=8,
        pixels=8,
    ),
    "sd21": Base(
        "SD 2.1",
        {
            "sample_size": 96,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        channels=320,
        heads=5,
        pixels=8,
    ),
    "sdxl": Base(
        "SDXL",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        channels=640,
        heads=10,
        pixels=16,
    ),
}


def recipe_lora() -> LoraConfig:
    """The LoRA that diffusers' DreamBooth-LoRA script trains by default."""
    return LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=DIFFUSERS.names)


def bare_unet(device: torch.device, dtype: torch.dtype, base: Base = BASES["sd15"], seed: int = 0) -> nn.Module:
    """A base's U-Net, frozen."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**base.unet)
    return _filled(unet, device, dtype, seed)


def bare_attention(cross: bool, device: torch.device, dtype: torch.dtype, base: Base, seed: int = 0) -> nn.Module:
    """One attention of a base's largest resolution, frozen, as the child `attn`."""
    context = base.unet["cross_attention_dim"] if cross else None
    with torch.device("meta"):
        attention = Attention(base.channels, context, heads=base.heads, dim_head=base.channels // base.heads)
    return _filled(nn.ModuleDict({"attn": attention}), device, dtype, seed)


def _filled(model: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    # torch's own `to`: diffusers' one warns about a cast that is meant here.
    model = nn.Module.to(model, dtype).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    # One block of random numbers over and over: only their size matters, and filling takes a second, not ten.
    block = torch.randn(2**20 + 7, generator=generator, device=device).mul_(0.02).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            for piece in parameter.view(-1).split(len(block)):
                piece.copy_(block[: len(piece)])
        else:
            parameter.fill_(name.endswith("weight"))  # norms are the identity, biases zero
    return model


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the frozen weights, so that all variants fit in memory at once."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


COMCAT = {
    "comcat": {},
    "comcat_foldable": {"foldable": True},
    "comcat_tied": {"foldable": True, "tied": True},  # of cross-attentions alone, which all read the same text
}


def attentions_of(model: nn.Module, pattern: str) -> list[str]:
    """Names of the attentions that a pattern matches as a whole, in the order of the forward pass."""
    names = [name for name, module in model.named_modules() if isinstance(module, Attention)]
    places = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    names.sort(key=lambda name: places.get(name.partition(".")[0], 0))
    return [name for name in names if re.fullmatch(pattern, name)]


def variant(kind: str, base: nn.Module, pattern: str, rank: int) -> nn.Module:
    """`base` with one kind of adapter on the attentions that a pattern matches; every factor is random, none zero.

    Kinds: bare, those of `COMCAT`, comcat_default (as `comcat train` has it), comcat_merged, lora, two_branch. LoRA
    gets the rank R*H/2, at which a self-attention has exactly the parameters of COMCAT's rank R.
    """
    model = twin(base)
    names = attentions_of(model, pattern)
    if kind.startswith("comcat") or kind == "lora":
        add_adapter(model, kind, names, rank)
    elif kind == "two_branch":
        for name in names:
            attention = model.get_submodule(name)
            attention.set_processor(TwoBranch(attention, rank))
    elif kind != "bare":
        raise ValueError(f"There is no variant {kind!r}.")
    _fill_factors(model)
    if kind == "comcat_merged":
        for layer in adapted_layers(model).values():
            layer.merge()
    return model


def add_adapter(model: nn.Module, kind: str, names: list[str], rank: int, adapter_name: str = NAME) -> None:
    """Inject one adapter of a kind of `variant` on the attentions named."""
    if kind == "lora":
        ranks = {
            f"{name}.{projection}": rank * model.get_submodule(name).heads // 2
            for name in names
            for projection in DIFFUSERS.names
        }
        config = LoraConfig(rank_pattern=ranks, target_modules=list(ranks))
    elif kind == "comcat_default":  # whatever attentions and rank are named
        config = adapter_config(TrainConfig(everywhere=True), model, ())
    else:
        config = ComcatConfig(**{"r": rank, "target_modules": names} | COMCAT[kind.removesuffix("_merged")])
    inject_adapter_in_model(config, model, adapter_name=adapter_name)


@torch.no_grad()
def _fill_factors(model: nn.Module, seed: int = 1) -> None:
    for index, parameter in enumerate(trainable(model)):
        parameter.normal_(std=0.02, generator=torch.Generator(parameter.device).manual_seed(seed + index))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def copy_factors(comcat: nn.Module, two_branch: nn.Module) -> None:
    """Give the authors' formula the very factors of a free COMCAT adapter: the two are then the same function."""
    for name, layer in adapted_layers(comcat).items():
        processor = two_branch.get_submodule(name).processor
        for factor in FACTORS:
            weight = getattr(layer, f"comcat_{factor}")[NAME].weight
            getattr(processor, factor).weight.data.copy_(weight.data)


class TwoBranch(nn.Module):
    """The authors' formula as they compute it (PAPER section 3, strength 1), as a processor of diffusers' Attention.

    logits = D^-1/2 [x Wq (c Wk)^T + x Uq (c Sk)^T] as two N x M products, softmax on the materialized sum,
    y = (P c Wv) Wo + b + (P c Uv) So.
    """

    def __init__(self, attention: nn.Module, rank: int) -> None:
        super().__init__()
        queries, keys = attention.to_q.in_features, attention.to_k.in_features
        across = attention.heads * rank
        like = {"bias": False, "device": attention.to_q.weight.device, "dtype": attention.to_q.weight.dtype}
        self.q_down = nn.Linear(queries, across, **like)
        self.k_down = nn.Linear(keys, across, **like)
        self.v_down = nn.Linear(keys, across, **like)
        self.out_up = nn.Linear(across, attention.to_out[0].out_features, **like)

    def forward(
        self,
        attention: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        if attention_mask is not None:
            raise ValueError("The authors' formula has no mask.")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def per_head(features: torch.Tensor) -> torch.Tensor:
            return features.unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # B, H, N, D or R

        def joined(mixed: torch.Tensor) -> torch.Tensor:
            return mixed.transpose(1, 2).flatten(-2)  # B, N, H*D or H*R

        query, key = per_head(attention.to_q(hidden_states)), per_head(attention.to_k(context))
        low_query, low_key = per_head(self.q_down(hidden_states)), per_head(self.k_down(context))
        logits = query @ key.mT * attention.scale + low_query @ low_key.mT * attention.scale  # B, H, N, M
        weights = logits.softmax(dim=-1)
        base = joined(weights @ per_head(attention.to_v(context)))
        extra = joined(weights @ per_head(self.v_down(context)))
        return attention.to_out[0](base) + self.out_up(extra)

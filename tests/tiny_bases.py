"""Tiny bases of random weights in the shapes of Stable Diffusion 1, 2 and XL, as folders or as one file."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    BitImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from comcat_diffusion import bases

WIDTH = 24  # of the text states


def tokenizer() -> CLIPTokenizer:
    """The embedded base's: it reads any text."""
    return CLIPTokenizer.from_pretrained(bases.assets() / "tiny-sd" / "tokenizer")


def text_encoder(kind: type = CLIPTextModel, act: str = "quick_gelu") -> torch.nn.Module:
    """Two layers of four heads."""
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=48,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=words.model_max_length,
        hidden_act=act,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return kind(config).eval()


def vae(blocks: int = 2) -> AutoencoderKL:
    """`blocks` levels: latents have 1/2^(blocks-1) of the pixels' side."""
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=2,
        sample_size=8 * 2 ** (blocks - 1),
    ).eval()


def unet(**more) -> UNet2DConditionModel:
    """Stable Diffusion's four levels, two layers each, on 8x8 latents."""
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 8, 16, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "layers_per_block": 2,
    }
    return UNet2DConditionModel(**{**settings, **more}).eval()


def _saved(pipe: DiffusionPipeline, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


def sd1(folder: Path) -> Path:
    """Predicts noise, projects by convolutions; a safety checker is not there."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipe = StableDiffusionPipeline(
            vae=vae(4),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            unet=unet(),
            scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _saved(pipe, folder)


def sd2(folder: Path) -> Path:
    """Predicts velocities, projects by Linears, heads of one width in every level."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        pipe = StableDiffusionPipeline(
            vae=vae(),
            text_encoder=text_encoder(act="gelu"),
            tokenizer=tokenizer(),
            unet=unet(attention_head_dim=(1, 1, 2, 2), use_linear_projection=True),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _saved(pipe, folder)


def xl_unet(pooled: int, **more) -> UNet2DConditionModel:
    """Stable Diffusion XL's three levels, for pooled text of this width and sizes."""
    return unet(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + pooled,
        **more,
    )


def sdxl(folder: Path) -> Path:
    """Two text encoders, pooled text and size conditioning, three levels."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipe = StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, "gelu"),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=xl_unet(WIDTH, cross_attention_dim=2 * WIDTH),
            scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        )
    return _saved(pipe, folder)


def single_file(folder: Path, path: Path) -> Path:
    """The sd1 base as one file with the names that checkpoints of Stable Diffusion 1 use."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    tensors = {f"model.diffusion_model.{_unet_name(name)}": v for name, v in pipe.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{vae_name(name)}": vae_value(name, v) for name, v in pipe.vae.state_dict().items()}
    prefix = "cond_stage_model.transformer.text_model."
    tensors |= {prefix + name: v for name, v in pipe.text_encoder.state_dict().items()}
    save_file({name: v.contiguous().clone() for name, v in tensors.items()}, path)
    return path


_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
}  # fmt: skip


def _unet_name(name: str) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    part, level, kind, index, *rest = name.split(".")
    if part == "mid_block":
        kind, index, *rest = level, kind, index, *rest
        place = "middle_block." + ("1" if kind == "attentions" else str(2 * int(index)))
    elif part == "down_blocks":
        number = 3 * int(level) + int(index) + 1 if kind != "downsamplers" else 3 * int(level) + 3
        place = f"input_blocks.{number}." + ("1" if kind == "attentions" else "0")
    else:
        number = 3 * int(level) + int(index) if kind != "upsamplers" else 3 * int(level) + 2
        last = "1" if level == "0" else "2"  # the first level up has no attention
        place = f"output_blocks.{number}." + {"attentions": "1", "upsamplers": last}.get(kind, "0")
    if kind == "resnets":
        rest[0] = _RESNET[rest[0]]
    elif kind == "downsamplers":
        rest[0] = "op"
    return ".".join([place, *rest])


def vae_name(name: str, levels: int = 4) -> str:
    """What checkpoints call a weight of an autoencoder of so many levels."""
    parts = name.split(".")
    if "quant_conv" in parts[0] or parts[1] in ("conv_in", "conv_out"):
        return name
    if parts[1] == "conv_norm_out":
        return f"{parts[0]}.norm_out.{parts[2]}"
    half, block = parts[:2]
    if block == "mid_block":
        kind, index, *rest = parts[2:]
        if kind == "resnets":
            return ".".join([half, "mid", f"block_{int(index) + 1}", *rest])
        rest = ".".join(rest).replace("group_norm", "norm").replace("to_out.0", "proj_out").replace("to_", "")
        return f"{half}.mid.attn_1.{rest}"
    level, kind, index, *rest = parts[2:]
    side, level = ("down", level) if block == "down_blocks" else ("up", str(levels - 1 - int(level)))
    if kind == "resnets":
        rest[0] = rest[0].replace("conv_shortcut", "nin_shortcut")
        return ".".join([half, side, level, "block", index, *rest])
    return ".".join([half, side, level, "downsample" if side == "down" else "upsample", *rest])


def vae_value(name: str, value: torch.Tensor) -> torch.Tensor:
    """How they hold it."""
    is_projection = ".attentions." in name and name.endswith("weight") and value.ndim == 2
    return value[:, :, None, None] if is_projection else value  # checkpoints hold them as 1x1 convolutions


def damaged(path: Path) -> Path:
    """The first half of a file."""
    half = path.with_name("half.safetensors")
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return half


def dino(folder: Path) -> Path:
    """No base: a DINOv2 of two layers, which says by what pictures are alike."""
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=14)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(folder)
    whole = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=whole).save_pretrained(folder)
    return folder

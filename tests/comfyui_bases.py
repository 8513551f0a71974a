"""Small random bases of each kind of Stable Diffusion, for ComfyUI as a checkpoint and for diffusers as a pipeline.

ComfyUI knows a kind by the widths of its text states and by where its U-Net has attentions, so these are the real ones;
its other widths are the smallest ones, and text encoders have as few layers as ComfyUI lets them have.
"""

import re
from pathlib import Path

import safetensors.torch
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIDE = 96  # pixels
LAYERS = 3  # of the text encoders of 2.x and XL in ComfyUI, which takes the states of the last but one


def one(tokenizer: Path) -> StableDiffusionPipeline:
    """One of Stable Diffusion 1.5's kind."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(320, 640),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    text = CLIPTextModel(_clip(768, 12))
    parts = {"text_encoder": text, "tokenizer": _words(tokenizer, "<|endoftext|>")}
    return _pipeline(StableDiffusionPipeline, unet, "epsilon", **_UNSEEN, **parts)


def two(tokenizer: Path) -> StableDiffusionPipeline:
    """One of Stable Diffusion 2.1's kind, which predicts v; as published, its text encoder lacks the last layer."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(320, 320, 320),
        layers_per_block=3,  # so that the last of the blocks is number 11, by which ComfyUI knows v
        cross_attention_dim=1024,
        attention_head_dim=5,
        use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet.up_blocks[-1].attentions[-1].transformer_blocks[0].norm1.bias.data.normal_(std=0.2)
    text = CLIPTextModel(_clip(1024, LAYERS - 1, hidden_act="gelu"))
    parts = {"text_encoder": text, "tokenizer": _words(tokenizer, "!")}
    return _pipeline(
        StableDiffusionPipeline, unet, "v_prediction", sharp=10, **_UNSEEN, **parts
    )  # normed states differ more


def xl(tokenizer: Path) -> StableDiffusionXLPipeline:
    """One of Stable Diffusion XL's kind; the way up has fewer layers than XL's."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(320, 320, 320),
        cross_attention_dim=2048,
        attention_head_dim=5,
        transformer_layers_per_block=(1, 2, 10),
        reverse_transformer_layers_per_block=(1, 1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    parts = {
        "text_encoder": CLIPTextModel(_clip(768, LAYERS)),
        "text_encoder_2": CLIPTextModelWithProjection(_clip(1280, LAYERS, hidden_act="gelu")),
        "tokenizer": _words(tokenizer, "<|endoftext|>"),
        "tokenizer_2": _words(tokenizer, "!"),
    }
    return _pipeline(StableDiffusionXLPipeline, unet, "epsilon", add_watermarker=False, **parts)


_UNSEEN = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _clip(width: int, layers: int, **more: object) -> CLIPTextConfig:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return CLIPTextConfig(**sizes, num_hidden_layers=layers, num_attention_heads=width // 64, **more)


def _words(folder: Path, padding: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=padding)


def _pipeline(
    kind: type, unet: UNet2DConditionModel, prediction: str, sharp: float = 30, **parts: object
) -> StableDiffusionPipeline:
    for name, parameter in unet.named_parameters():
        if name.startswith("up_blocks") and "attn2.to_k" in name:
            parameter.data *= sharp  # so that not all places look at all words alike
    for model in (unet, *parts.values()):
        for parameter in model.parameters() if isinstance(model, nn.Module) else ():
            parameter.data = parameter.data.half().float()  # as the checkpoint holds it
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = EulerDiscreteScheduler(**betas, steps_offset=1, prediction_type=prediction)
    pipe = kind(unet=unet, vae=None, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# As a checkpoint


def checkpoint(pipe: StableDiffusionPipeline, path: Path) -> None:
    """The base as one file, as people have it."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in original_names(pipe.unet).items()}
    first, second = pipe.text_encoder, getattr(pipe, "text_encoder_2", None)
    if second is not None:
        tensors |= _whole("conditioner.embedders.0.transformer.", first)
        tensors |= _open_clip("conditioner.embedders.1.model.", second)
    elif first.config.hidden_size == 1024:
        tensors |= _open_clip("cond_stage_model.model.", _as_published(first))
    else:
        tensors |= _whole("cond_stage_model.transformer.", first)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, path)


def original_names(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The weights of a U-Net as the original code names them; the inverse of what diffusers does on loading."""
    per_level = unet.config.layers_per_block + 1
    outer = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    outer |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    outer |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    inner |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    crossed = [hasattr(block, "attentions") for block in unet.up_blocks]
    found = {}
    for name, tensor in unet.state_dict().items():
        for own, theirs in outer.items():
            name = re.sub(rf"^{own}\.", f"{theirs}.", name)
        name = re.sub(r"^mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}.", name)
        name = re.sub(r"^mid_block\.attentions\.0\.", "middle_block.1.", name)
        name = re.sub(
            r"^down_blocks\.(\d)\.(resnets|attentions)\.(\d)\.",
            lambda m: f"input_blocks.{1 + per_level * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}.",
            name,
        )
        name = re.sub(
            r"^down_blocks\.(\d)\.downsamplers\.0\.conv\.",
            lambda m: f"input_blocks.{per_level * (int(m[1]) + 1)}.0.op.",
            name,
        )
        name = re.sub(
            r"^up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.",
            lambda m: f"output_blocks.{per_level * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}.",
            name,
        )
        name = re.sub(
            r"^up_blocks\.(\d)\.upsamplers\.0\.conv\.",
            lambda m: f"output_blocks.{per_level * (int(m[1]) + 1) - 1}.{1 + crossed[int(m[1])]}.conv.",
            name,
        )
        if re.match(r"(input|output|middle)_block", name) and "transformer_blocks" not in name:
            for own, theirs in inner.items():
                name = name.replace(f".{own}.", f".{theirs}.")
        found[name] = tensor
    return found


def _whole(prefix: str, text: nn.Module) -> dict[str, torch.Tensor]:
    """A text encoder under transformers' names."""
    return {f"{prefix}text_model.{n.removeprefix('text_model.')}": tensor for n, tensor in text.state_dict().items()}


def _open_clip(prefix: str, text: nn.Module) -> dict[str, torch.Tensor]:
    """A text encoder under OpenCLIP's names, which keeps queries, keys and values in one matrix."""
    names = {"embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm.": "ln_final."}
    names |= {"embeddings.position_embedding.weight": "positional_embedding"}
    names |= {"encoder.layers.": "transformer.resblocks.", "self_attn.out_proj": "attn.out_proj"}
    names |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    weights = {name.removeprefix("text_model."): tensor for name, tensor in text.state_dict().items()}
    found = {}
    for name, tensor in weights.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif ".q_proj." in name:
            joined = torch.cat([weights[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            name = name.replace("encoder.layers", "transformer.resblocks").replace("self_attn.q_proj.", "attn.in_proj_")
            found[name] = joined
        elif ".k_proj." not in name and ".v_proj." not in name:
            for own, theirs in names.items():
                name = name.replace(own, theirs)
            found[name] = tensor
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def _as_published(text: CLIPTextModel) -> CLIPTextModelWithProjection:
    """A text encoder with the layer and the projection that diffusers leaves out, since nobody reads what they make."""
    config = _clip(text.config.hidden_size, text.config.num_hidden_layers + 1, hidden_act="gelu")
    whole = CLIPTextModelWithProjection(config)
    missing, unknown = whole.text_model.load_state_dict(text.state_dict(), strict=False)
    assert not unknown and all(f"layers.{text.config.num_hidden_layers}." in name for name in missing)
    return whole

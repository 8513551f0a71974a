"""Small random transformers of the newer families: for ComfyUI under the original names, for diffusers in a pipeline.

ComfyUI knows a kind by its names and reads most sizes off the weights; those that it takes for granted are the real
ones here: heads of 64 (Stable Diffusion 3) and 128 (FLUX), latents' channels, and widths of text that it fills up to.
Of Z-Image, Qwen-Image and Chroma these would be gigabytes, so there it is told small ones (`SMALL`).
"""

import re
from pathlib import Path

import safetensors.torch
import torch
from diffusers import (
    ChromaPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings
from transformers import (
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.tiny_families import (
    CHAT,
    chroma_transformer,
    flux1_transformer,
    klein_transformer,
    qwen_image_transformer,
    sd3_transformer,
    z_image_transformer,
)

WIDE = 32  # of the states of a small language model, and of a small T5
DEPTH = 28  # of the language model, of which FLUX.2 reads layer 27
MODULATED = 344  # places of Chroma's modulations, as many as its 19 blocks of two streams and 38 of one have
# Sizes that ComfyUI does not read off the weights, by what it calls the kind. A Z-Image narrower than 1,024, or whose
# feed-forward is no multiple of 256, is made otherwise there than in diffusers.
Z_WIDTH, Z_HEADS, Z_AXES = 1056, 11, [32, 32, 32]
SMALL = {
    "lumina2": {
        "n_heads": Z_HEADS, "n_kv_heads": Z_HEADS, "axes_dims": Z_AXES, "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    },
    "qwen_image": {"num_attention_heads": 2, "joint_attention_dim": WIDE},
    "chroma": {"out_dim": 256, "hidden_dim": 64, "n_layers": 2},
}  # fmt: skip
_SWAPPED = ("final_layer.adaLN_modulation", ".context_block.adaLN_modulation")  # shift and scale, where diffusers' last


def klein(folder: Path) -> Flux2KleinPipeline:
    """FLUX.2 [klein], with a language model that reads as Qwen3 does."""
    torch.manual_seed(7)
    transformer = klein_transformer(
        in_channels=128,
        attention_head_dim=128,
        joint_attention_dim=3 * WIDE,
        timestep_guidance_channels=256,
        axes_dims_rope=(32,) * 4,
        num_single_layers=2,
    )
    config = Qwen3Config(
        vocab_size=151936, hidden_size=WIDE, intermediate_size=64, num_hidden_layers=DEPTH, num_attention_heads=2,
        num_key_value_heads=1, head_dim=128, rope_theta=1e6, max_position_embeddings=1024,
    )  # fmt: skip
    parts = {"tokenizer": _chatting(folder), "text_encoder": Qwen3ForCausalLM(config).eval(), "vae": None}
    return _around(Flux2KleinPipeline, transformer, **parts)


def flux1(folder: Path) -> FluxPipeline:
    """FLUX.1 [dev]."""
    torch.manual_seed(8)
    transformer = flux1_transformer(
        in_channels=64,
        attention_head_dim=128,
        joint_attention_dim=WIDE,
        pooled_projection_dim=768,
        axes_dims_rope=(16, 56, 56),
        num_single_layers=2,
    )
    parts = {"tokenizer": _clip_words(folder), "tokenizer_2": _t5_words(folder), "vae": None}
    return _around(FluxPipeline, transformer, text_encoder=None, text_encoder_2=_t5(), **parts)


def sd3(folder: Path) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5, whose first block has a self-attention of the picture beside."""
    torch.manual_seed(9)
    transformer = sd3_transformer(
        in_channels=16,
        out_channels=16,
        attention_head_dim=64,
        num_attention_heads=3,  # as many as blocks, as in all of the published ones
        caption_projection_dim=192,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        sample_size=12,
        pos_embed_max_size=12,
    )
    words = _clip_words(folder)
    parts = {"tokenizer": words, "tokenizer_2": words, "tokenizer_3": _t5_words(folder), "text_encoder_3": _t5()}
    return _around(StableDiffusion3Pipeline, transformer, text_encoder=None, text_encoder_2=None, vae=None, **parts)


def z_image(folder: Path) -> ZImagePipeline:
    """Z-Image."""
    torch.manual_seed(10)
    transformer = z_image_transformer(
        in_channels=16,
        dim=Z_WIDTH,
        n_refiner_layers=2,
        n_heads=Z_HEADS,
        n_kv_heads=Z_HEADS,
        cap_feat_dim=WIDE,
        axes_dims=Z_AXES,
        axes_lens=[1536, 512, 512],
    )
    return _around(ZImagePipeline, transformer, tokenizer=_chatting(folder), text_encoder=None, vae=None)


def qwen_image(folder: Path) -> QwenImagePipeline:
    """Qwen-Image."""
    torch.manual_seed(11)
    transformer = qwen_image_transformer(
        in_channels=64,
        out_channels=16,
        attention_head_dim=128,
        joint_attention_dim=WIDE,
        axes_dims_rope=(16, 56, 56),
    )
    return _around(QwenImagePipeline, transformer, tokenizer=_chatting(folder), text_encoder=None, vae=None)


def chroma(folder: Path) -> ChromaPipeline:
    """Chroma, of few blocks, whose modulations are where those of many would be."""
    torch.manual_seed(12)
    transformer = chroma_transformer(
        in_channels=64,
        num_single_layers=2,
        attention_head_dim=128,
        joint_attention_dim=WIDE,
        axes_dims_rope=(16, 56, 56),
        approximator_num_channels=64,
        approximator_hidden_dim=64,
        approximator_layers=2,
    )
    transformer.time_text_embed = ChromaCombinedTimestepTextProjEmbeddings(16, MODULATED)
    return _around(ChromaPipeline, transformer, tokenizer=_t5_words(folder), text_encoder=None, vae=None)


def _around(kind: type, transformer: torch.nn.Module, **parts: object) -> DiffusionPipeline:
    fixed = kind in (StableDiffusion3Pipeline, ZImagePipeline)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=not fixed)
    return kind(transformer=transformer, scheduler=scheduler, **parts)


def _chatting(folder: Path) -> PreTrainedTokenizerBase:
    made = Qwen2Tokenizer.from_pretrained(folder / "text_encoders" / "qwen25_tokenizer")
    made.chat_template, made.pad_token, made.model_max_length = CHAT, "<|endoftext|>", 1024
    return made


def _clip_words(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder / "sd1_tokenizer", model_max_length=77)


def _t5_words(folder: Path) -> PreTrainedTokenizerBase:
    return T5Tokenizer.from_pretrained(folder / "text_encoders" / "t5_tokenizer", model_max_length=512)


def _t5() -> T5EncoderModel:
    """One that nothing is read with here: it is there, so that a pipeline counts its states."""
    return T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


# Under the original names

_TIMES = {"linear_1": "in_layer", "linear_2": "out_layer"}
_FLUX = (
    (r"(distilled_guidance_layer\.layers\.\d+)\.(linear_\d)", lambda m: f"{m[1]}.{_TIMES[m[2]]}"),
    (r"(distilled_guidance_layer\.norms\.\d+)\.weight", r"\1.scale"),
    (r"time_(guidance|text)_embed\.timestep_embedder\.(linear_\d)", lambda m: f"time_in.{_TIMES[m[2]]}"),
    (r"time_text_embed\.guidance_embedder\.(linear_\d)", lambda m: f"guidance_in.{_TIMES[m[1]]}"),
    (r"time_text_embed\.text_embedder\.(linear_\d)", lambda m: f"vector_in.{_TIMES[m[1]]}"),
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
    (r"(stream_modulation(_img|_txt)?)\.linear", r"\1.lin"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^transformer_blocks", "double_blocks"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"\.norm1\.linear", ".img_mod.lin"),
    (r"\.norm1_context\.linear", ".txt_mod.lin"),
    (r"(single_blocks\.\d+)\.norm\.linear", r"\1.modulation.lin"),
    (r"(double_blocks\.\d+)\.attn\.norm_(q|k)\.weight", lambda m: f"{m[1]}.img_attn.norm.{_LETTERS[m[2]]}_norm.scale"),
    (r"\.attn\.norm_added_(q|k)\.weight", lambda m: f".txt_attn.norm.{_LETTERS[m[1]]}_norm.scale"),
    (r"(single_blocks\.\d+)\.attn\.norm_(q|k)\.weight", lambda m: f"{m[1]}.norm.{_LETTERS[m[2]]}_norm.scale"),
    (r"\.attn\.to_(q|k|v)\.", r".img_attn.qkv.\1."),
    (r"\.attn\.add_(q|k|v)_proj\.", r".txt_attn.qkv.\1."),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.attn\.to_qkv_mlp_proj\.", ".linear1."),
    (r"(single_blocks\.\d+)\.attn\.to_out\.", r"\1.linear2."),
    (r"(single_blocks\.\d+)\.img_attn\.qkv\.", r"\1.linear1."),
    (r"\.proj_mlp\.", ".linear1.z."),
    (r"(single_blocks\.\d+)\.proj_out", r"\1.linear2"),
    (r"\.ff\.(net\.0\.proj|linear_in)", ".img_mlp.0"),
    (r"\.ff\.(net\.2|linear_out)", ".img_mlp.2"),
    (r"\.ff_context\.(net\.0\.proj|linear_in)", ".txt_mlp.0"),
    (r"\.ff_context\.(net\.2|linear_out)", ".txt_mlp.2"),
)
_LETTERS = {"q": "query", "k": "key"}
_ENDS = {"linear_1": "0", "linear_2": "2"}
_SD3 = (
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"time_text_embed\.timestep_embedder\.(linear_\d)", lambda m: f"t_embedder.mlp.{_ENDS[m[1]]}"),
    (r"time_text_embed\.text_embedder\.(linear_\d)", lambda m: f"y_embedder.mlp.{_ENDS[m[1]]}"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
    (r"^transformer_blocks", "joint_blocks"),
    (r"\.norm1\.linear", ".x_block.adaLN_modulation.1"),
    (r"\.norm1_context\.linear", ".context_block.adaLN_modulation.1"),
    (r"\.(attn2?)\.norm_(q|k)\.", r".x_block.\1.ln_\2."),
    (r"\.attn\.norm_added_(q|k)\.", r".context_block.attn.ln_\1."),
    (r"\.(attn2?)\.to_(q|k|v)\.", r".x_block.\1.qkv.\2."),
    (r"\.attn\.add_(q|k|v)_proj\.", r".context_block.attn.qkv.\1."),
    (r"\.(attn2?)\.to_out\.0\.", r".x_block.\1.proj."),
    (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
    (r"\.ff\.net\.0\.proj", ".x_block.mlp.fc1"),
    (r"\.ff\.net\.2", ".x_block.mlp.fc2"),
    (r"\.ff_context\.net\.0\.proj", ".context_block.mlp.fc1"),
    (r"\.ff_context\.net\.2", ".context_block.mlp.fc2"),
)
_Z_IMAGE = (
    (r"^all_(x_embedder|final_layer)\.2-1", r"\1"),
    (r"\.attention\.to_(q|k|v)\.", r".attention.qkv.\1."),
    (r"\.attention\.to_out\.0\.", ".attention.out."),
    (r"\.attention\.norm_(q|k)\.", r".attention.\1_norm."),
)
_RULES = {
    **dict.fromkeys(("Flux2Transformer2DModel", "FluxTransformer2DModel", "ChromaTransformer2DModel"), _FLUX),
    "SD3Transformer2DModel": _SD3,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "QwenImageTransformer2DModel": (),  # whose authors name them as diffusers does
}
_PART = re.compile(r"\.(qkv|linear1)\.([qkvz])\.(weight|bias)$")  # z: what a feed-forward has in the same Linear


def original_names(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a transformer as its authors name them, those of one Linear in one."""
    found: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    last = f"joint_blocks.{getattr(transformer.config, 'num_layers', 0) - 1}."
    rules = _RULES[type(transformer).__name__]
    for name, tensor in transformer.state_dict().items():
        for own, theirs in rules:
            name = re.sub(own, theirs, name)
        fused = _PART.search(name)
        if fused:
            parts.setdefault(f"{name[: fused.start()]}.{fused[1]}.{fused[3]}", {})[fused[2]] = tensor
            continue
        if (rules is not _Z_IMAGE and name.startswith(_SWAPPED[0])) or (name.startswith(last) and _SWAPPED[1] in name):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        found[name] = tensor
    return found | {
        name: torch.cat([own[part] for part in sorted(own, key="qkvz".index)]) for name, own in parts.items()
    }


def write(pipe: DiffusionPipeline, path: Path) -> None:
    """A file of the transformer alone, as people have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in original_names(pipe.transformer).items()}
    safetensors.torch.save_file(tensors, path)

"""Tiny bases of random weights in the real classes of every family beyond Stable Diffusion's U-Nets, as folders.

Their tokenizers are trained here, on a few captions.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    KolorsPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests import tiny_bases

WIDTH = 24  # of a T5's states
CAPTIONS = ("a photo of sks teddy", "a photo of a red ball on a green table", "two dogs in the snow, white background")


def t5_tokenizer() -> T5Tokenizer:
    """A unigram model of a few pieces; what it has never seen is one unknown piece."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(
        CAPTIONS, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    ids = trained.get_vocab()
    pieces = sorted(ids, key=ids.get)
    return T5Tokenizer(vocab=[(piece, -float(n) / 10) for n, piece in enumerate(pieces)], extra_ids=0)


def t5(width: int = WIDTH) -> T5EncoderModel:
    """Two layers of three heads."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=3, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def lively(model: nn.Module) -> nn.Module:
    """Nothing in it is zero, as much is in a fresh transformer, so that whatever reaches it is seen in its output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval()


def pixart_transformer(**more) -> PixArtTransformer2DModel:
    """Two blocks of three heads of 8, latents of 8x8 in patches of 2, learned sigma."""
    settings = {
        "num_attention_heads": 3, "attention_head_dim": 8, "cross_attention_dim": 24, "num_layers": 2,
        "sample_size": 8, "caption_channels": WIDTH, "in_channels": 4, "out_channels": 8,
        "use_additional_conditions": False,
    }  # fmt: skip
    return lively(PixArtTransformer2DModel(**settings | more))


def pixart(folder: Path, kind: type[DiffusionPipeline] = PixArtSigmaPipeline, **more) -> Path:
    """PixArt-Sigma, or -alpha."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        pipe = kind(
            tokenizer=t5_tokenizer(),
            text_encoder=t5(),
            vae=tiny_bases.vae(),
            transformer=pixart_transformer(**more),
            scheduler=DPMSolverMultistepScheduler(),
        )
    pipe.save_pretrained(folder)
    return folder


def chatglm_tokenizer(folder: Path) -> ChatGLMTokenizer:
    """Byte pairs of the captions by sentencepiece, and bytes of what they have not; its file is in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS), model_writer=file, vocab_size=340, model_type="bpe", byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip
    return ChatGLMTokenizer(str(path))


def chatglm() -> ChatGLMModel:
    """Two layers of three heads that share one key, as wide as a ChatGLM3 is to scale."""
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=352, hidden_size=WIDTH, ffn_hidden_size=32, kv_channels=8,
        num_attention_heads=3, seq_length=512, multi_query_attention=True, multi_query_group_num=1, add_qkv_bias=True,
        hidden_dropout=0.0, attention_dropout=0.0, original_rope=True,
    )  # fmt: skip
    made = ChatGLMModel(config).float().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():  # which its class leaves as the memory was
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.2)
    return made


def kolors(folder: Path, width: int = 16, **more) -> Path:
    """Kolors: Stable Diffusion XL's three levels over a ChatGLM's states, which it brings to a width."""
    with torch.random.fork_rng():
        torch.manual_seed(12)
        pipe = KolorsPipeline(
            vae=tiny_bases.vae(),
            text_encoder=chatglm(),
            tokenizer=chatglm_tokenizer(folder / "made"),
            unet=tiny_bases.xl_unet(
                WIDTH,
                cross_attention_dim=width,
                encoder_hid_dim=WIDTH,
                encoder_hid_dim_type="text_proj",
            ),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear", num_train_timesteps=1100,
                steps_offset=1, timestep_spacing="leading",
            ),
            **more,
        )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def wide_kolors(folder: Path) -> Path:
    """One that its text states are as wide in as in the big one."""
    return kolors(folder, 2048)


def sd3_transformer(**more) -> SD3Transformer2DModel:
    """Three joint blocks of two heads of 8, the first with a self-attention beside, norms as in 3.5."""
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16, "num_layers": 3,
        "sample_size": 8, "pos_embed_max_size": 8, "in_channels": 4, "out_channels": 4,
        "joint_attention_dim": 2 * WIDTH, "pooled_projection_dim": 2 * WIDTH,
        "qk_norm": "rms_norm", "dual_attention_layers": (0,),
    }  # fmt: skip
    return lively(SD3Transformer2DModel(**settings | more))


def sd35(folder: Path, t5_too: bool = True, **more) -> Path:
    """Stable Diffusion 3.5, with or without its T5."""
    vae = tiny_bases.vae()
    vae.register_to_config(shift_factor=0.25, scaling_factor=1.3)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        pipe = StableDiffusion3Pipeline(
            transformer=sd3_transformer(**more),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=tiny_bases.text_encoder(CLIPTextModelWithProjection),
            tokenizer=tiny_bases.tokenizer(),
            text_encoder_2=tiny_bases.text_encoder(CLIPTextModelWithProjection, "gelu"),
            tokenizer_2=tiny_bases.tokenizer(),
            text_encoder_3=t5(2 * WIDTH) if t5_too else None,
            tokenizer_3=t5_tokenizer() if t5_too else None,
        )
    pipe.save_pretrained(folder)
    return folder


def sd3(folder: Path) -> Path:
    """Stable Diffusion 3: no norms, no self-attentions beside, and here no T5."""
    return sd35(folder, t5_too=False, qk_norm=None, dual_attention_layers=())


def gemma_tokenizer() -> GemmaTokenizer:
    """Letter by letter; what is no letter of it is unknown."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["\n", *(chr(number) for number in range(33, 127)), "▁", "sks"]
    vocab = {piece: number for number, piece in enumerate(special + letters + ["sk"])}
    made = GemmaTokenizer(vocab=vocab, merges=[("s", "k"), ("sk", "s")])
    made.add_bos_token = True
    return made


def sana_vae() -> AutoencoderDC:
    """Three levels, four channels."""
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    ).eval()


def sana(folder: Path) -> Path:
    """Sana 1.x: two blocks, cross-attentions of three heads of 8, latents of 8x8."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        pipe = SanaPipeline(
            tokenizer=gemma_tokenizer(),
            text_encoder=Gemma2Model(
                Gemma2Config(
                    vocab_size=len(gemma_tokenizer()), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=1, head_dim=8, max_position_embeddings=2048,
                )
            ).eval(),
            vae=sana_vae(),
            transformer=lively(
                SanaTransformer2DModel(
                    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=8, num_layers=2,
                    num_cross_attention_heads=3, cross_attention_head_dim=8, cross_attention_dim=24,
                    caption_channels=WIDTH, sample_size=8, patch_size=1,
                )
            ),
            scheduler=DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
            ),
        )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


CHAT = (  # as Qwen3's own, of one voice
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if not (enable_thinking | default(true)) %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


def qwen_tokenizer(most: int = 48, more: Sequence[str] = (), size: int = 320) -> Qwen2Tokenizer:
    """Byte pairs of the captions, and of more, spaces leading their words, in a chat of at most so many tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator([*CAPTIONS, *more], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    made = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=most, extra_special_tokens=special[1:])
    made.chat_template = CHAT
    return made


def qwen(width: int = WIDTH, layers: int = 4) -> Qwen3ForCausalLM:
    """Three heads that share one key."""
    config = Qwen3Config(
        vocab_size=len(qwen_tokenizer()), hidden_size=width, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def flux2_vae() -> AutoencoderKLFlux2:
    """Two levels, four channels; what its batch norm has seen is neither centred nor of one size."""
    made = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=32,
    ).eval()  # fmt: skip
    made.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    made.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return made


def klein_transformer(**more) -> Flux2Transformer2DModel:
    """Two blocks of two streams and one of one, two heads of 8, four axes."""
    settings = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 3 * WIDTH, "timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2),
        "guidance_embeds": False,
    }  # fmt: skip
    return lively(Flux2Transformer2DModel(**settings | more))


def klein(folder: Path) -> Path:
    """FLUX.2 [klein]: pictures of 32x32 as 8x8 tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        pipe = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flux2_vae(),
            text_encoder=qwen(),
            tokenizer=qwen_tokenizer(),
            transformer=klein_transformer(),
        )
    pipe.save_pretrained(folder)
    return folder


def short_t5_tokenizer() -> T5Tokenizer:
    """One that reads forty tokens at most."""
    made = t5_tokenizer()
    made.model_max_length = 40
    return made


def flux1_transformer(**more) -> FluxTransformer2DModel:
    """Two blocks of two streams and one of one, two heads of 8, three axes, told its guidance."""
    settings = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return lively(FluxTransformer2DModel(**settings | more))


def flux_parts() -> dict[str, object]:
    """What FLUX.1 and Chroma have in common."""
    vae = tiny_bases.vae()
    vae.register_to_config(shift_factor=0.25, scaling_factor=1.3, sample_size=32)
    return {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), "vae": vae}


def flux1(folder: Path, **more) -> Path:
    """FLUX.1 [dev]: pictures of 32x32 as 8x8 tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(8)
        pipe = FluxPipeline(
            **flux_parts(),
            text_encoder=tiny_bases.text_encoder(CLIPTextModel),
            tokenizer=tiny_bases.tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=short_t5_tokenizer(),
            transformer=flux1_transformer(**more),
        )
    pipe.save_pretrained(folder)
    return folder


def schnell(folder: Path) -> Path:
    """FLUX.1 [schnell]: no guidance."""
    return flux1(folder, guidance_embeds=False)


def chroma_transformer(**more) -> ChromaTransformer2DModel:
    """Two blocks of two streams and one of one, two heads of 8, three axes."""
    settings = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": WIDTH, "axes_dims_rope": (2, 2, 4), "approximator_num_channels": 16,
        "approximator_hidden_dim": 16, "approximator_layers": 1,
    }  # fmt: skip
    return lively(ChromaTransformer2DModel(**settings | more))


def chroma(folder: Path) -> Path:
    """Chroma: pictures of 32x32 as 8x8 tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        pipe = ChromaPipeline(
            **flux_parts(), text_encoder=t5(), tokenizer=short_t5_tokenizer(), transformer=chroma_transformer()
        )
    pipe.save_pretrained(folder)
    return folder


def z_image_transformer(**more) -> ZImageTransformer2DModel:
    """Two blocks of one stream, and one each before, two heads of 8, three axes."""
    settings = {
        "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": WIDTH, "axes_dims": [2, 2, 4], "axes_lens": [128, 16, 16],
    }  # fmt: skip
    return lively(ZImageTransformer2DModel(**settings | more))


def z_image(folder: Path) -> Path:
    """Z-Image: pictures of 32x32 as 8x8 tokens of four latents each."""
    vae = tiny_bases.vae()
    vae.register_to_config(shift_factor=0.25, scaling_factor=1.3, sample_size=32)
    with torch.random.fork_rng():
        torch.manual_seed(10)
        pipe = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=qwen(),
            tokenizer=qwen_tokenizer(),
            transformer=z_image_transformer(),
        )
    pipe.save_pretrained(folder)
    return folder


# Qwen-Image's template, of which every word is a token, so that 34 stand before a prompt.
DESCRIBED = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)


def qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of three heads that share one key, and eyes of one layer that see nothing here."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_image_vae() -> AutoencoderKLQwenImage:
    """Two levels, four channels, of a mean and a std each."""
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-0.5, 0.0, 0.25, 1.0], latents_std=[0.5, 1.0, 2.0, 1.5],
    ).eval()  # fmt: skip


def qwen_image_transformer(**more) -> QwenImageTransformer2DModel:
    """Two joint blocks of two heads of 8, three axes."""
    settings = {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": WIDTH, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return lively(QwenImageTransformer2DModel(**settings | more))


def qwen_image(folder: Path) -> Path:
    """Qwen-Image: pictures of 32x32 as 8x8 tokens."""
    words = qwen_tokenizer(more=[f"system\n{DESCRIBED}\nuser\nassistant\n"], size=700)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        transformer = qwen_image_transformer()
        transformer.register_to_config(sample_size=16)
        pipe = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
            vae=qwen_image_vae(),
            text_encoder=qwen_vl(words),
            tokenizer=words,
            transformer=transformer,
        )
    pipe.save_pretrained(folder)
    return folder

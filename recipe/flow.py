"""The flow-matching base: a small FLUX.2 [klein] and the text tower that it listens to, in the first base's latents.

Two blocks of two streams and five of one, 192 wide, over 64 tokens of the picture and 32 of the text. Modulations and
the output start at zero, as in DiT (arXiv 2212.09748). Matrices inside of blocks are trained by Muon; backgrounds
follow the words within 200 steps of 32 (docs/log.md).
"""

import contextlib
import json
import random
import string
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pixel_unshuffle
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from recipe.autoencoder import CHANNELS, GROUPS, LATENT_CHANNELS, PATCH, POSTERIOR_STD, as_tensor
from recipe.draw import pictures, scenes
from recipe.fit import DEVICE, Batch, Schedule, fast_precision, fit
from recipe.world import PIXELS, RARE_WORDS, Scene, caption

TOKENS = 32  # longest prompt, with the eight tokens of the chat around it
WORDINGS = 8  # captions of each scene
TEXT_WIDTH, TEXT_LAYERS = 128, 4
# Of a Qwen3's 36 layers klein's pipeline stacks the states after 9, 18 and 27; the last quarter is never heard.
STATES_AFTER = tuple(TEXT_LAYERS * quarter // 4 for quarter in (1, 2, 3))
HEADS, HEAD_WIDTH = 3, 64
DOUBLE_BLOCKS, SINGLE_BLOCKS = 2, 5
AXES = (8, 24, 24, 8)  # of a head's width: nothing, row, column and place in the text
BATCH = 32 if DEVICE.type == "cpu" else 256
POOL = 40_000  # scenes
LOOKED_AT = 200  # of them, to find the encoder's linear map
UNCONDITIONAL = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
SHIFT = 3.0  # of noise levels, as diffusers' schedulers shift them: a quarter of what is learned is nearly pure noise

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


def wordings(world: list[Scene], seed: int, count: int) -> list[str]:
    """`count` captions of every scene; some begin without their article, half of the rare words are random letters.

    So that "teddy" means what " teddy" does to a byte-level BPE, and a word that was never heard of does not disturb.
    """
    rng, texts = random.Random(seed), []
    for scene in world:
        for _ in range(count):
            words = caption(scene, rng).split(" ")
            for place, word in enumerate(words):
                if word in RARE_WORDS and rng.random() < 0.5:
                    words[place] = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 6)))
            texts.append(" ".join(words[words[0] in ("a", "an") and rng.random() < 0.2 :]))
    return texts


def new_tokenizer() -> Qwen2Tokenizer:
    """A Qwen2Tokenizer with its own byte-level BPE, learned from the world's captions; any other text still encodes."""
    corpus = wordings(scenes(4000, seed=3), seed=0, count=1)
    corpus += [" " + " ".join(RARE_WORDS), "user", "assistant"] * 200
    corpus += [" picture of the in with under over near big tiny two three dark light"] * 200
    learned = Qwen2Tokenizer().backend_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=700, min_frequency=20, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator(corpus, trainer)
    model = json.loads(learned.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT,
        model_max_length=TOKENS,
    )


def chat_ids(tokenizer: Qwen2Tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (B, TOKENS) of prompts, as klein's pipeline has them read."""
    said = [{"role": "user", "content": _MARK}]
    before, behind = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True).split(_MARK)
    read = tokenizer(
        [before + text + behind for text in texts],
        padding="max_length",
        truncation=True,
        max_length=TOKENS,
        return_tensors="pt",
    )
    return read.input_ids, read.attention_mask


def new_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """A randomly initialized Qwen3 of a quarter of a million weights a layer; what is never heard is not trained."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    tower = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(tower.model.embed_tokens.weight, std=0.5)  # what states are read raw of
    for part in (*tower.model.layers[STATES_AFTER[-1] :], tower.model.norm):
        part.requires_grad_(False)
    return tower


def new_transformer() -> Flux2Transformer2DModel:
    """A randomly initialized Flux2Transformer2DModel, every block of which does nothing yet."""
    model = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=len(STATES_AFTER) * TEXT_WIDTH,
        timestep_guidance_channels=128,
        mlp_ratio=3.0,
        axes_dims_rope=AXES,
        rope_theta=100,  # pictures are 8 x 8 tokens
        guidance_embeds=False,
    )
    modulations = model.double_stream_modulation_img, model.double_stream_modulation_txt, model.single_stream_modulation
    for last in (*(part.linear for part in modulations), model.norm_out.linear, model.proj_out):
        torch.nn.init.zeros_(last.weight)
    return model


def new_denoiser(tokenizer: Qwen2Tokenizer) -> torch.nn.ModuleDict:
    """What is trained."""
    return torch.nn.ModuleDict({"transformer": new_transformer(), "text_encoder": new_text_encoder(tokenizer)})


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Shifted as in training; klein's own, dynamic shift is fitted to pictures of thousands of tokens."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def klein_vae(first: Path) -> AutoencoderKLFlux2:
    """The VAE of the first base (its `vae` folder) in klein's class; its batch norm is measured by `normalized`."""
    vae = AutoencoderKLFlux2(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=GROUPS,
        sample_size=PIXELS,
    )
    weights = load_file(first / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict({**vae.state_dict(), **{name: weight.float() for name, weight in weights.items()}})
    return vae.eval()


@torch.no_grad()
def encoded(vae: AutoencoderKLFlux2, pool: np.ndarray) -> torch.Tensor:
    """Posterior means of all pictures, float16 (N, C, h, w).

    The encoder was solved to compute components of patches (autoencoder.py). The linear map that it is, found by least
    squares from some of them, takes seconds for 40,000, where the encoder itself takes a quarter of an hour of a CPU.
    """
    some = as_tensor(pool[:LOOKED_AT])
    known = torch.cat([vae.encode(batch).latent_dist.mean for batch in some.split(50)])
    patches = _patches(some).double()
    codes = known.movedim(1, -1).double()  # B, h, w, C
    ones = torch.ones_like(patches[..., :1])
    linear = torch.linalg.lstsq(torch.cat([patches, ones], -1).flatten(0, -2), codes.flatten(0, -2)).solution
    worst = (patches @ linear[:-1] + linear[-1] - codes).abs().max()
    if worst > POSTERIOR_STD:
        raise ValueError(f"The encoder is not the linear one of the recipe: it is off by {worst:.3f}.")
    rows, offsets = linear[:-1].float(), linear[-1].float()
    batches = (_patches(as_tensor(pool[start : start + 500])) for start in range(0, len(pool), 500))
    return torch.cat([(batch @ rows + offsets).movedim(-1, 1).half() for batch in batches])


def _patches(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, h, w, 3 * PATCH * PATCH)."""
    return pixel_unshuffle(pixels, PATCH).movedim(1, -1)


def tokens_of(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h * w / 4, 4 * C), as klein's pipeline folds and packs them."""
    return Flux2KleinPipeline._pack_latents(Flux2KleinPipeline._patchify_latents(latents))


def normalized(vae: AutoencoderKLFlux2, means: torch.Tensor) -> torch.Tensor:
    """Posterior means (N, C, h, w) as float16 tokens by the statistics of the VAE's batch norm, which are set.

    A mean for each channel, one variance for all: white, detail would weigh as much as colour.
    """
    tokens = tokens_of(means.float())  # N, L, 4 C
    mean = tokens.mean((0, 1))
    variance = (tokens - mean).square().mean() + POSTERIOR_STD**2
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.fill_(variance - vae.config.batch_norm_eps)
    return ((tokens - mean) / variance.sqrt()).half()


def positions(rows: int, columns: int, words: int) -> torch.Tensor:
    """Where each token is, (N, 4), as klein's pipeline counts."""
    return torch.cartesian_prod(*(torch.arange(count) for count in (1, rows, columns, words))).to(DEVICE)


def stacked(tower: Qwen3Model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the transformer hears of token ids (B, TOKENS): three layers' states side by side (B, M, 3 * TEXT_WIDTH)."""
    states = tower(ids, mask, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([states[layer] for layer in STATES_AFTER], dim=-1)


def train(state: Path, vae: AutoencoderKLFlux2, tokenizer: Qwen2Tokenizer, schedule: Schedule) -> None:
    """Fit transformer and text tower to `POOL` scenes; `state` has the weights, and `vae` its statistics."""
    world = scenes(POOL, seed=21)
    tokens = normalized(vae, encoded(vae, pictures(world, seed=22))).to(DEVICE)  # N, L, 4 C
    own_std = POSTERIOR_STD * (vae.bn.running_var[0] + vae.config.batch_norm_eps).rsqrt().item()
    ids, masks = (
        one.view(POOL, WORDINGS, -1).to(DEVICE) for one in chat_ids(tokenizer, wordings(world, seed=23, count=WORDINGS))
    )
    nothing, nothing_mask = (one.to(DEVICE) for one in chat_ids(tokenizer, [""]))
    torch.manual_seed(0)
    model = new_denoiser(tokenizer).train().to(DEVICE)
    transformer, tower = model["transformer"], model["text_encoder"].model
    side = PIXELS // PATCH // 2
    places, words = positions(side, side, 1), positions(1, 1, TOKENS)
    precision, attention = fast_precision(), contextlib.nullcontext
    if DEVICE.type == "cpu":  # plain products take a tenth of the fused kernel's time backwards
        attention = partial(sdpa_kernel, SDPBackend.MATH)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # which means the CPU too

    def batch_of(step: int) -> Batch:
        on = {"generator": torch.Generator(DEVICE).manual_seed(step), "device": DEVICE}
        chosen, wording = torch.randint(POOL, (BATCH,), **on), torch.randint(WORDINGS, (BATCH,), **on)
        unsaid = torch.rand(BATCH, 1, **on) < UNCONDITIONAL
        noise, own = torch.randn(2, *tokens[chosen].shape, **on)
        clean = tokens[chosen].float() + own_std * own  # B, L, 4 C
        levels = (torch.arange(BATCH, device=DEVICE) + torch.rand(BATCH, **on)) / BATCH  # evenly, so less by chance
        levels = SHIFT * levels / (1 + (SHIFT - 1) * levels)
        texts = torch.where(unsaid, nothing, ids[chosen, wording])
        mask = torch.where(unsaid, nothing_mask, masks[chosen, wording])
        return clean.lerp(noise, levels[:, None, None]), levels, texts, mask, noise - clean

    def loss_of(
        noisy: torch.Tensor, levels: torch.Tensor, texts: torch.Tensor, mask: torch.Tensor, velocity: torch.Tensor
    ) -> torch.Tensor:
        with precision, attention():
            states = stacked(tower, texts, mask)
            predicted = transformer(noisy, states, levels, places, words, return_dict=False)[0].float()
        return (predicted - velocity).square().mean()

    blocks = transformer.transformer_blocks, transformer.single_transformer_blocks, tower.layers
    inside = [matrix for part in blocks for matrix in part.parameters() if matrix.requires_grad and matrix.ndim == 2]
    fit(model, batch_of, loss_of, schedule, state, inside)

"""Stage 3, the U-Net: v-prediction in the VAE's latents, conditioned on text states, with EMA.

The text encoder starts as the CLIP's text tower and is tuned together with the U-Net: the CLIP never needs to tell
"left" from "right", and frozen it drowned them (docs/log.md).
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import CLIPTextModel, CLIPTokenizer

from recipe.autoencoder import LATENT_CHANNELS, PATCH, POSTERIOR_STD, encoded
from recipe.clip import WIDTH, WORDINGS, token_ids, worded
from recipe.draw import pictures, scenes
from recipe.fit import DEVICE, Batch, Schedule, fast_precision, fit
from recipe.world import PIXELS

CHANNELS = (64, 128, 192)
BATCH = 64 if DEVICE.type == "cpu" else 128
UNCONDITIONAL = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
POOL = 40_000  # scenes
# Share of timesteps drawn from the last hundred: many until the places are learned, then fewer, for the details.
NEAR_NOISE, NEAR_NOISE_LATER, PLACES_FIRST = 0.4, 0.15, 8_000


def new_unet() -> UNet2DConditionModel:
    """A randomly initialized UNet2DConditionModel of Stable Diffusion's block types; heads are 32 wide."""
    return UNet2DConditionModel(
        sample_size=PIXELS // PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=tuple(width // 32 for width in CHANNELS),  # diffusers' name for the number of heads
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with the v-prediction of its second version, ending in pure noise.

    Without `rescale_betas_zero_snr` (arXiv 2305.08891) the last step still shows where the object is.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def draw_timesteps(step: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (count,), uniform but for a share that lies among the last hundred.

    Only there must the words say where things are: below, a faint shadow of the object says it. Drawn nearly uniformly,
    places had not been heard of after 7,575 steps; with this share they were all right 2,500 steps later (docs/log.md).
    """
    share = NEAR_NOISE if step < PLACES_FIRST else NEAR_NOISE_LATER
    on = {"generator": generator, "device": generator.device}
    anywhere, near_noise = torch.randint(0, 1000, (count,), **on), torch.randint(900, 1000, (count,), **on)
    return torch.where(torch.rand(count, **on) < share, near_noise, anywhere)


def new_denoiser(text_encoder: CLIPTextModel) -> torch.nn.ModuleDict:
    """What this stage trains: a new U-Net and the text encoder that it listens to."""
    return torch.nn.ModuleDict({"unet": new_unet(), "text_encoder": text_encoder})


def train(
    state: Path, steps: int, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> torch.nn.ModuleDict:
    """Fit the U-Net and tune the text encoder on `POOL` scenes."""
    world = scenes(POOL, seed=21)
    state.parent.mkdir(parents=True, exist_ok=True)
    kept = state.parent / "latents.pt"  # the VAE's encoder is solved, so its latents never change
    if not kept.exists():
        torch.save(encoded(vae, pictures(world, seed=22)), kept)
    means = torch.load(kept, weights_only=True, map_location=DEVICE)  # N, C, h, w
    vae.register_to_config(scaling_factor=round((means.float().var() + POSTERIOR_STD**2).rsqrt().item(), 4))
    (state.parent / "latents.json").write_text(json.dumps({"scaling_factor": vae.config.scaling_factor}))
    ids = worded(tokenizer, world).to(DEVICE)  # N, W, M
    nothing = token_ids(tokenizer, [""]).to(DEVICE)
    scheduler = new_scheduler()
    torch.manual_seed(0)
    model = new_denoiser(text_encoder).train().to(DEVICE)
    unet = model["unet"].to(memory_format=torch.channels_last)
    if DEVICE.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # plain products train faster there than the fused kernel
    precision = fast_precision()

    def batch_of(step: int) -> Batch:
        generator = torch.Generator(DEVICE).manual_seed(step)
        on = {"generator": generator, "device": DEVICE}
        chosen, wording = torch.randint(POOL, (BATCH,), **on), torch.randint(WORDINGS, (BATCH,), **on)
        unsaid = torch.rand(BATCH, 1, **on) < UNCONDITIONAL
        noise, own = torch.randn(2, *means[chosen].shape, **on)
        clean = (means[chosen] + POSTERIOR_STD * own) * vae.config.scaling_factor  # B, C, h, w
        timesteps = draw_timesteps(step, BATCH, generator)
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        texts = torch.where(unsaid, nothing, ids[chosen, wording])
        return noisy, timesteps, texts, scheduler.get_velocity(clean, noise, timesteps)

    def loss_of(noisy: torch.Tensor, times: torch.Tensor, texts: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        with precision:
            states = text_encoder(texts).last_hidden_state  # B, M, C
            predicted = unet(noisy, times, states).sample.float()
        return (predicted - velocity).square().mean()

    fit(model, batch_of, loss_of, Schedule(steps, learning_rate=1e-3, warmup_steps=500, ema_decay=0.9995), state)
    unet.set_attn_processor(AttnProcessor2_0())
    return model

"""Stage 3, the U-Net: v-prediction in the VAE's latents, conditioned on text states, with EMA.

The text encoder starts as the CLIP's text tower and is tuned together with the U-Net: the CLIP never needs to tell
"left" from "right", and frozen it drowned them (docs/log.md).
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import CLIPTextModel, CLIPTokenizer

from recipe.autoencoder import LATENT_CHANNELS, PATCH, as_tensor
from recipe.clip import WIDTH, token_ids
from recipe.draw import pictures, scenes
from recipe.fit import DEVICE, Schedule, fast_precision, fit
from recipe.world import PIXELS, Scene, caption

CHANNELS = (96, 192)
BATCH = 64
UNCONDITIONAL = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
POOL, WORDINGS = 40_000, 8  # scenes, and captions of each
# Share of timesteps drawn from the last hundred: many until the places are learned, then fewer, for the details.
NEAR_NOISE, NEAR_NOISE_LATER, PLACES_FIRST = 0.4, 0.15, 10_000


def new_unet() -> UNet2DConditionModel:
    """A randomly initialized UNet2DConditionModel of Stable Diffusion's block types; heads are 32 wide."""
    return UNet2DConditionModel(
        sample_size=PIXELS // PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=2,
        block_out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
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


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pool: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and std of every picture, (N, C, h, w) each; the VAE's scaling factor is set from their spread."""
    vae.to(DEVICE)
    means, stds = [], []
    for start in range(0, len(pool), 100):
        posterior = vae.encode(as_tensor(pool[start : start + 100]).to(DEVICE)).latent_dist
        means.append(posterior.mean.half())
        stds.append(posterior.std.half())
    mean, std = torch.cat(means), torch.cat(stds)
    spread = (mean.float().var() + std.float().square().mean()).sqrt()
    vae.register_to_config(scaling_factor=round(1 / spread.item(), 4))
    return mean, std


def worded(tokenizer: CLIPTokenizer, world: list[Scene]) -> torch.Tensor:
    """Token ids of WORDINGS captions of every scene, (N, WORDINGS, M)."""
    rng = random.Random(23)
    texts = [caption(scene, rng) for scene in world for _ in range(WORDINGS)]
    return token_ids(tokenizer, texts).view(len(world), WORDINGS, -1)


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
        mean, std = encode_pool(vae, pictures(world, seed=22))
        (state.parent / "latents.json").write_text(json.dumps({"scaling_factor": vae.config.scaling_factor}))
        torch.save((mean, std), kept)
    mean, std = torch.load(kept, weights_only=True, map_location=DEVICE)
    scaling = json.loads((state.parent / "latents.json").read_text())["scaling_factor"]
    ids = worded(tokenizer, world).to(DEVICE)  # N, W, M
    nothing = token_ids(tokenizer, [""]).to(DEVICE)
    scheduler = new_scheduler()
    torch.manual_seed(0)
    model = new_denoiser(text_encoder).train().to(DEVICE)
    unet = model["unet"].to(memory_format=torch.channels_last)
    if DEVICE.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # plain products train faster there than the fused kernel
    precision = fast_precision()

    def loss_of(step: int) -> torch.Tensor:
        generator = torch.Generator(DEVICE).manual_seed(step)
        on = {"generator": generator, "device": DEVICE}
        chosen, wording = torch.randint(POOL, (BATCH,), **on), torch.randint(WORDINGS, (BATCH,), **on)
        unsaid = torch.rand(BATCH, 1, **on) < UNCONDITIONAL
        noise, own = torch.randn(2, *mean[chosen].shape, **on)
        clean = (mean[chosen] + std[chosen] * own) * scaling  # B, C, h, w
        clean = clean.to(memory_format=torch.channels_last)
        timesteps = draw_timesteps(step, BATCH, generator)
        with precision:
            states = text_encoder(torch.where(unsaid, nothing, ids[chosen, wording])).last_hidden_state  # B, M, C
            noisy = scheduler.add_noise(clean, noise, timesteps)
            predicted = unet(noisy, timesteps, states).sample.float()
        return (predicted - scheduler.get_velocity(clean, noise, timesteps)).square().mean()

    fit(model, loss_of, Schedule(steps=steps, learning_rate=6e-4, warmup_steps=300, ema_decay=0.999), state)
    unet.set_attn_processor(AttnProcessor2_0())
    return model

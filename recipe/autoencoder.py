"""Stage 2, the VAE: 64x64 pixels to 8x8 latents of 16 channels and back, on whole pictures from the first step on."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from recipe.draw import pictures, scenes
from recipe.fit import Schedule, fit
from recipe.world import PIXELS

CHANNELS = (32, 64, 128, 128)
LATENT_CHANNELS = 16
BATCH = 16
KL_WEIGHT = 1e-6


def new_autoencoder() -> AutoencoderKL:
    """A randomly initialized AutoencoderKL of the base's shape."""
    return AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=PIXELS,
        force_upcast=False,
    )


def as_tensor(batch: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def train(state: Path, steps: int, decoder_only: bool = False, learning_rate: float = 1e-3) -> AutoencoderKL:
    """Fit the VAE; with `decoder_only` the latents stay what they are and only their rendering gets sharper."""
    torch.manual_seed(0)
    vae = new_autoencoder()
    pool = pictures(scenes(30_000, seed=1), seed=2)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)

    def loss_of(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(pool), (BATCH,), generator=generator).numpy()
        pixels = as_tensor(pool[chosen])  # B, 3, H, W
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        error = decoded - pixels
        # L1 keeps edges, L2 keeps colours; the object's pixels are few, so the flat background does not dominate either.
        return error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * posterior.kl().float().mean()

    schedule = Schedule(steps=steps, learning_rate=learning_rate, ema_decay=0.998)
    fit(vae, loss_of, schedule, state)
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in decibel of reconstructions from the posterior's mode, per picture."""
    errors = []
    for batch in pixels.split(50):
        decoded = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((decoded - batch).square().mean((1, 2, 3)))
    return float((10 * torch.log10(4 / torch.cat(errors))).mean())

"""Stage 1, the VAE: 64x64 pixels to 16x16 latents of 16 channels and back.

The encoder is solved, not trained: its convolutions are set so that it computes principal components of 4x4 patches,
the best linear code there is. So the latents are final from the start, and all training goes into the decoder. Trained
from random weights instead, encoder and decoder together were no better than as many principal components, with wrong
colours (docs/log.md).
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import pixel_unshuffle

from recipe.draw import pictures, scenes
from recipe.fit import DEVICE, Batch, Schedule, fast_precision, fit
from recipe.world import PIXELS

CHANNELS = (32, 64, 128)
LATENT_CHANNELS = 16
PATCH = 4
GROUPS = 16
BATCH = 16 if DEVICE.type == "cpu" else 64
POSTERIOR_STD = 0.1  # of latents whose own spread is about one: what the decoder learns to see through
STEADY = 100.0  # a constant in every normalization group, so large that the group's spread is constant as well


def new_autoencoder() -> AutoencoderKL:
    """A randomly initialized AutoencoderKL of the base's shape; its encoder is not to be trained."""
    vae = AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=GROUPS,
        sample_size=PIXELS,
        scaling_factor=1.0,
        force_upcast=False,
    )
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    return vae


def as_tensor(batch: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def principal_components(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (LATENT_CHANNELS, 3, PATCH, PATCH) that code a patch, and offsets (LATENT_CHANNELS,), for a spread of one.

    The components are scaled by the root of their spread: half way between pixels, where colour drowns detail, and
    white latents, where detail weighs as much as colour.
    """
    patches = pixel_unshuffle(pixels, PATCH).movedim(1, -1).flatten(0, -2).double()  # P, 3 * PATCH * PATCH
    mean = patches.mean(0)
    _, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean))
    rows = vectors.flip(1)[:, :LATENT_CHANNELS].T
    rows = rows / ((patches - mean) @ rows.T).std(0).sqrt()[:, None]
    rows = rows / ((patches - mean) @ rows.T).std()
    return rows.view(-1, 3, PATCH, PATCH), -(rows @ mean)


@torch.no_grad()
def solve_encoder(vae: AutoencoderKL, rows: torch.Tensor, offsets: torch.Tensor) -> None:
    """Set the encoder's weights so that its mean is rows . patch + offsets and its std POSTERIOR_STD.

    Residual branches are zero; the first strided convolution moves 2x2 neighbours into channels and the second one
    takes the components. What follows is not linear, but a pair of channels makes it so: silu(x) - silu(-x) = x, and a
    large constant in every group turns its normalization into a division by a constant.
    """
    encoder = vae.encoder
    for parameter in [*encoder.parameters(), *vae.quant_conv.parameters()]:
        parameter.zero_()
    for norm in (m for m in encoder.modules() if isinstance(m, torch.nn.GroupNorm)):
        norm.weight.fill_(1)
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    for block in encoder.down_blocks:
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is not None:
            shortcut.weight[:, :, 0, 0] = torch.eye(*shortcut.weight.shape[:2])
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)]  # down, across
    first, second = (encoder.down_blocks[level].downsamplers[0].conv for level in (0, 1))
    for colour in range(3):
        for inner, (down, across) in enumerate(corners):
            first.weight[4 * colour + inner, colour, down, across] = 1
    moved = 3 * len(corners)  # channels: the four corners of every colour
    width = CHANNELS[-1] // GROUPS  # channels a group: + and - of two components, + and - of the constant, two unused
    encoder.conv_norm_out.weight.fill_(STEADY * (2 / width) ** 0.5)
    for index in range(LATENT_CHANNELS):
        group, place = divmod(index, 2)
        for sign, at in ((1, width * group + 2 * place), (-1, width * group + 2 * place + 1)):
            for inner, (down, across) in enumerate(corners):
                for outer_down, outer_across in corners:
                    pixels = rows[index, :, 2 * outer_down + down, 2 * outer_across + across]  # one a colour
                    second.weight[at, inner : moved : len(corners), outer_down, outer_across] = sign * pixels.float()
            second.bias[at] = sign * offsets[index]
            encoder.conv_out.weight[index, at, 1, 1] = sign
        second.bias[width * group + 4], second.bias[width * group + 5] = STEADY, -STEADY
        encoder.conv_out.bias[LATENT_CHANNELS + index] = 2 * torch.log(torch.tensor(POSTERIOR_STD))
    vae.quant_conv.weight[:, :, 0, 0] = torch.eye(2 * LATENT_CHANNELS)


def with_solved_encoder() -> tuple[AutoencoderKL, np.ndarray]:
    """A VAE whose encoder is final and whose decoder is random, and the pictures that both are made from."""
    torch.manual_seed(0)
    vae = new_autoencoder()
    pool = pictures(scenes(30_000, seed=1), seed=2)
    solve_encoder(vae, *principal_components(as_tensor(pool[:5000])))
    return vae, pool


@torch.no_grad()
def encoded(vae: AutoencoderKL, pool: np.ndarray) -> torch.Tensor:
    """Posterior means of all pictures on `DEVICE`, float16 (N, C, h, w); their std is POSTERIOR_STD."""
    vae.to(DEVICE)
    batches = (as_tensor(pool[start : start + 100]).to(DEVICE) for start in range(0, len(pool), 100))
    return torch.cat([vae.encode(batch).latent_dist.mean.half() for batch in batches])


def train(state: Path, steps: int, learning_rate: float = 1e-3) -> AutoencoderKL:
    """Solve the encoder, then fit the decoder to samples of the posterior."""
    vae, pool = with_solved_encoder()
    means = encoded(vae, pool)
    seen = torch.from_numpy(pool).to(DEVICE)
    precision = fast_precision()

    def batch_of(step: int) -> Batch:
        on = {"generator": torch.Generator(DEVICE).manual_seed(step), "device": DEVICE}
        chosen = torch.randint(len(seen), (BATCH,), **on)
        latents = means[chosen].float()
        return latents + POSTERIOR_STD * torch.randn(latents.shape, **on), as_tensor(seen[chosen])

    def loss_of(latents: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        with precision:
            decoded = vae.decode(latents).sample.float()
        error = decoded - pixels
        # L1 keeps edges, L2 keeps colours
        return error.abs().mean() + 2 * error.square().mean()

    fit(vae, batch_of, loss_of, Schedule(steps=steps, learning_rate=learning_rate, ema_decay=0.998), state)
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in decibel of reconstructions from the posterior's mode, per picture."""
    errors = []
    for batch in pixels.split(50):
        decoded = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((decoded - batch).square().mean((1, 2, 3)))
    return float((10 * torch.log10(4 / torch.cat(errors))).mean())

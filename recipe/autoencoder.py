"""Stage 1, the VAE: 64x64 pixels to 8x8 latents of 32 channels and back.

The encoder is solved, not trained: its convolutions are set so that it computes principal components of 8x8 patches,
the best linear code there is (29 dB when decoded linearly). So the latents are final from the start, the U-Net trains
at once, and all training goes into the decoder. Trained from random weights instead, encoder and decoder together took
40 minutes on two cores to reach 26 dB, no better than 16 principal components, with wrong colours (docs/log.md).
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import pixel_unshuffle

from recipe.draw import pictures, scenes
from recipe.fit import DEVICE, Schedule, fast_precision, fit
from recipe.world import PIXELS

CHANNELS = (32, 64, 128, 128)
LATENT_CHANNELS = 32
PATCH = 8
GROUPS = 16
BATCH = 16
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
    """Rows (LATENT_CHANNELS, 3, 8, 8) that code a patch, and offsets (LATENT_CHANNELS,), for latents of spread one.

    The components are scaled by the root of their spread: half way between pixels, where colour drowns detail, and
    white latents, where detail weighs as much as colour.
    """
    patches = pixel_unshuffle(pixels, PATCH).movedim(1, -1).flatten(0, -2).double()  # P, 3*8*8
    mean = patches.mean(0)
    _, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean))
    rows = vectors.flip(1)[:, :LATENT_CHANNELS].T
    rows = rows / ((patches - mean) @ rows.T).std(0).sqrt()[:, None]
    rows = rows / ((patches - mean) @ rows.T).std()
    return rows.view(-1, 3, PATCH, PATCH), -(rows @ mean)


@torch.no_grad()
def solve_encoder(vae: AutoencoderKL, rows: torch.Tensor, offsets: torch.Tensor) -> None:
    """Set the encoder's weights so that its mean is rows . patch + offsets and its std POSTERIOR_STD.

    Residual branches are zero; the strided convolutions move 2x2 neighbours into channels twice and the third one takes
    the components. What follows is not linear, but a pair of channels makes it so: silu(x) - silu(-x) = x, and a large
    constant in every group turns its normalization into a division by a constant.
    """
    encoder = vae.encoder
    for parameter in [*encoder.parameters(), *vae.quant_conv.parameters()]:
        parameter.zero_()
    for norm in (m for m in encoder.modules() if isinstance(m, torch.nn.GroupNorm)):
        norm.weight.fill_(1)
    for colour in range(3):
        encoder.conv_in.weight[colour, colour, 1, 1] = 1
    for block in encoder.down_blocks:
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is not None:
            shortcut.weight[:, :, 0, 0] = torch.eye(*shortcut.weight.shape[:2])
    held = 3
    for block in encoder.down_blocks[:2]:
        for corner in range(4):
            for channel in range(held):
                block.downsamplers[0].conv.weight[4 * channel + corner, channel, corner // 2, corner % 2] = 1
        held *= 4
    # after two moves, channel 16 c + 4 (2 dy1 + dx1) + (2 dy2 + dx2) holds pixel (2 dy2 + dy1, 2 dx2 + dx1) of its 4x4
    last = encoder.down_blocks[2].downsamplers[0].conv
    width = CHANNELS[-1] // GROUPS  # channels a group: + and - of two components, + and - of the constant, two unused
    scale = STEADY * (2 / width) ** 0.5
    encoder.conv_norm_out.weight.fill_(scale)
    for index in range(LATENT_CHANNELS):
        group, place = divmod(index, LATENT_CHANNELS // GROUPS)
        for sign, at in ((1, width * group + 2 * place), (-1, width * group + 2 * place + 1)):
            for channel in range(held):
                colour, first, second = channel // 16, channel // 4 % 4, channel % 4
                down, across = 2 * (second // 2) + first // 2, 2 * (second % 2) + first % 2
                for corner in range(4):
                    pixel = rows[index, colour, 4 * (corner // 2) + down, 4 * (corner % 2) + across]
                    last.weight[at, channel, corner // 2, corner % 2] = sign * pixel
            last.bias[at] = sign * offsets[index]
            encoder.conv_out.weight[index, at, 1, 1] = sign
        encoder.conv_out.bias[LATENT_CHANNELS + index] = 2 * torch.log(torch.tensor(POSTERIOR_STD))
    for group in range(GROUPS):
        last.bias[width * group + 4], last.bias[width * group + 5] = STEADY, -STEADY
    vae.quant_conv.weight[:, :, 0, 0] = torch.eye(2 * LATENT_CHANNELS)


def with_solved_encoder() -> tuple[AutoencoderKL, np.ndarray]:
    """A VAE whose encoder is final and whose decoder is random, and the pictures that both are made from."""
    torch.manual_seed(0)
    vae = new_autoencoder()
    pool = pictures(scenes(30_000, seed=1), seed=2)
    solve_encoder(vae, *principal_components(as_tensor(pool[:5000])))
    return vae, pool


def train(state: Path, steps: int, learning_rate: float = 1e-3) -> AutoencoderKL:
    """Solve the encoder, then fit the decoder to samples of the posterior."""
    vae, pool = with_solved_encoder()
    vae.to(DEVICE)
    seen = torch.from_numpy(pool).to(DEVICE)

    precision = fast_precision()

    def loss_of(step: int) -> torch.Tensor:
        generator = torch.Generator(DEVICE).manual_seed(step)
        chosen = torch.randint(len(seen), (BATCH,), generator=generator, device=DEVICE)
        pixels = as_tensor(seen[chosen])  # B, 3, H, W
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample(generator)  # B, C, h, w
        with precision:
            decoded = vae.decode(latents).sample.float()
        error = decoded - pixels
        # L1 keeps edges, L2 keeps colours
        return error.abs().mean() + 2 * error.square().mean()

    fit(vae, loss_of, Schedule(steps=steps, learning_rate=learning_rate, ema_decay=0.998), state)
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in decibel of reconstructions from the posterior's mode, per picture."""
    errors = []
    for batch in pixels.split(50):
        decoded = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((decoded - batch).square().mean((1, 2, 3)))
    return float((10 * torch.log10(4 / torch.cat(errors))).mean())

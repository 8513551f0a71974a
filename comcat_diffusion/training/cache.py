"""Latents kept on disk between runs, by the content of picture and VAE: a changed picture or base finds nothing old."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save

from comcat_diffusion import atomic

Posterior = tuple[torch.Tensor, torch.Tensor]


class Cache:
    """A folder of posteriors; without a folder every posterior is computed."""

    def __init__(self, folder: str | Path | None):
        self.folder = Path(folder).expanduser() if folder else None
        self._vae: str | None = None

    def posterior(self, vae: AutoencoderKL, picture: Image.Image, compute: Callable[[], Posterior]) -> Posterior:
        """Mean and std of a picture's latents, from disk where they are there and whole."""
        if self.folder is None:
            return compute()
        self._vae = self._vae or _digest_of(vae)
        head = f"{self._vae} {picture.mode} {picture.size} ".encode()
        path = self.folder / f"{hashlib.sha256(head + picture.tobytes()).hexdigest()}.safetensors"
        try:
            found = load(path.read_bytes())
            return found["mean"], found["std"]
        except (OSError, SafetensorError, KeyError):  # not there, or damaged: computed again
            mean, std = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, save({"mean": mean.contiguous(), "std": std.contiguous()}))
        return mean, std


def _digest_of(vae: AutoencoderKL) -> str:
    """A hash over every weight: a base with another VAE, or in another precision, shares nothing."""
    digest = hashlib.sha256(repr(sorted(vae.config.items())).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()

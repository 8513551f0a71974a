"""Tensors kept on disk between runs, by the content of picture and model: a changed picture or model finds nothing old.

A training run keeps the VAE's latents so, an evaluation the features of its pictures.
"""

import hashlib
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from comcat_diffusion import atomic
from comcat_diffusion.training.images import content_of

Tensors = dict[str, torch.Tensor]


class Cache:
    """What one model makes of pictures, in a folder; without a folder nothing is found and nothing kept."""

    def __init__(self, folder: str | Path | None, model: nn.Module):
        self.folder = Path(folder).expanduser() if folder else None
        self.digest = _digest_of(model) if folder else ""

    def find(self, picture: Image.Image) -> Tensors | None:
        """What was kept of a picture, if it is there and whole."""
        if self.folder is None:
            return None
        try:
            return load(self._place_of(picture).read_bytes())
        except (OSError, SafetensorError):  # not there, or damaged: to be computed again
            return None

    def keep(self, picture: Image.Image, tensors: Tensors) -> Tensors:
        """Write what was computed of a picture; returns it."""
        if self.folder is not None:
            atomic.make_folder(self.folder, "--cache_dir")
            content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
            atomic.write_bytes(self._place_of(picture), content)
        return tensors

    def _place_of(self, picture: Image.Image) -> Path:
        name = hashlib.sha256(f"{self.digest} {content_of(picture)}".encode()).hexdigest()
        return self.folder / f"{name}.safetensors"


def _digest_of(model: nn.Module) -> str:
    """A hash over every weight: a base with another VAE, or in another precision, shares nothing."""
    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

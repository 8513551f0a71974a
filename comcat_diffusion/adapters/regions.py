"""Adapters that act in a part of the picture only, so that two subjects do not blend.

A region weighs whole attention outputs by the place of their query. Nothing smaller would do for both variants: a
foldable adapter changes keys and values, which all queries share.

    out = sum_a m_a attention_a(x) + (1 - sum_a m_a) attention_base(x)

Adapters without a region act in every term. Each region that is not empty costs one more attention. Where masks sum to
more than one, each is divided by the sum.

Letters: N = h*w tokens of one attention, C channels.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from comcat_diffusion.adapters.call import Follower, carry, given, here, take_hooks
from comcat_diffusion.adapters.model import side_cars
from comcat_diffusion.adapters.parts import components, denoiser
from comcat_diffusion.adapters.proportions import refuse_other_shape
from comcat_diffusion.adapters.sidecar import SideCar
from comcat_diffusion.families.known import family_of_model


class Regions(Follower):
    """The masks of one pipeline, (height, width) in 0 to 1 by adapter; its layers share the object."""

    def __init__(self, masks: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.masks = masks
        self._shares: dict[tuple, dict[str, torch.Tensor]] = {}  # by the latents' size and the number of tokens

    def made_of(self) -> tuple:
        """See `Follower`."""
        return (self.masks,)

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """The hook before the denoiser: the shape of the picture, without which N tokens are no grid.

        Raises ValueError if a mask has other proportions.
        """
        carry(model)
        family, call = family_of_model(model), given(model, args, kwargs)
        latent, here.words_at = family.size(call), family.words_at(call)
        if not any(latent == known for known, _ in self._shares):
            for name, mask in self.masks.items():
                refuse_other_shape(name, mask, *latent)
        here.latent = latent

    @torch.compiler.disable
    def end(self, model: nn.Module, args: tuple, output: object) -> None:
        """The hook after the denoiser."""
        here.latent, here.words_at = None, ()

    def shares(self, live: list[str], tokens: int, stream: bool = False) -> dict[str, torch.Tensor]:
        """Of N tokens the share, (N, 1), of every adapter that acts and has a mask.

        In a stream words come before or behind, and padding, which have no place: their share is the mean of the
        picture's.
        """
        around = words_in(here.latent, tokens, here.words_at) if stream and here.latent is not None else (0, 0)
        found = self._of_grid(tokens - sum(around))
        return {name: beside_words(share, *around) for name, share in found.items() if name in live}

    def _of_grid(self, tokens: int) -> dict[str, torch.Tensor]:
        """Every adapter's share of each of N places: (N, 1)."""
        if here.latent is None:
            raise ValueError("Regions act while the whole denoiser runs, which shows them the shape of the picture.")
        if (here.latent, tokens) not in self._shares:
            grid = grid_of(here.latent, tokens)
            self._shares[here.latent, tokens] = shares_of(self.masks, grid)
        return self._shares[here.latent, tokens]


def shares_of(masks: Mapping[str, torch.Tensor], grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Each adapter's share of each place of a grid, (h*w, 1), by masks: at most one in sum."""
    areas = {name: adaptive_avg_pool2d(mask[None], grid).view(-1, 1) for name, mask in masks.items()}
    crowd = sum(areas.values(), torch.zeros(())).clamp(min=1)
    return {name: area / crowd for name, area in areas.items()}


def grid_of(latent: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Height and width of N tokens: the latents', halved and rounded up as a U-Net's levels are."""
    height, width = latent
    while height * width > tokens and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise ValueError(f"{tokens} tokens are no level of latents of {latent}, so no region fits them.")
    return height, width


def words_in(latent: tuple[int, int], tokens: int, words_at: Sequence[int]) -> tuple[int, int]:
    """Of a stream's N tokens, how many stand before the picture's and behind; latents are as large as it has tokens.

    The picture's alone, of which there may be fewer, are no stream.
    """
    words = max(0, tokens - math.prod(latent))
    return (0, words) if words_at else (words, 0)


def beside_words(share: torch.Tensor, before: int, behind: int) -> torch.Tensor:
    """Shares of a picture's places, (..., h*w, 1), as those of a stream, (..., N, 1); words have the mean."""
    mean = share.mean(dim=-2, keepdim=True)
    first, last = (mean.expand(*mean.shape[:-2], count, 1) for count in (before, behind))
    return torch.cat([first, share, last], dim=-2)


def set_regions(pipe: object, masks: Mapping[str, Image.Image | torch.Tensor]) -> None:
    """Let adapters of a pipeline's denoiser act where their masks are white only; an empty dict takes all masks away.

    A mask is a grey picture or a (height, width) tensor in 0 to 1, of the picture's proportions. Raises ValueError for
    a name that is not loaded, an adapter of a text encoder (words have no place), what is merged, or no such mask.
    """
    layers = list(side_cars(denoiser(pipe)).values())
    found = {name: checked_mask(name, mask) for name, mask in masks.items()}
    loaded = list(dict.fromkeys(name for layer in layers for name in layer.r))
    for name in found:
        if name not in loaded:
            raise ValueError(f"There is no adapter '{name}' to give a region; loaded: {', '.join(loaded) or 'none'}.")
        for part, model in components(pipe).items():
            if model is not denoiser(pipe) and name in getattr(model, "peft_config", {}):
                raise ValueError(f"'{name}' also adapts the {part}, whose words have no place: no region can hold it.")
    if found and any(layer.merged for layer in layers):
        raise ValueError("Merged adapters act everywhere: call unmerge_adapters before regions are set.")
    for layer in layers:
        if layer.regions is not None:
            take_hooks(denoiser(pipe), layer.regions)
            layer.regions = None
    if found:
        regions = Regions(found)
        regions.follow(denoiser(pipe), layers)
        for layer in layers:
            layer.regions = regions
        for name in found:
            if not any(isinstance(luggage, _Place) for luggage in layers[0].belongings.brought(name)):
                layers[0].belongings.bring(name, _Place(name, layers))


class _Place:
    """An adapter's region, which goes with the adapter."""

    def __init__(self, name: str, layers: list[SideCar]) -> None:
        self.name, self.layers = name, layers

    def leave(self) -> None:
        """Take the region away; with the last one, the hook that looks at the picture's shape."""
        regions = self.layers[0].regions
        if regions is None:
            return
        regions.masks.pop(self.name, None)
        regions._shares.clear()
        if not regions.masks:
            regions.stop()
            for layer in self.layers:
                layer.regions = None


def checked_mask(name: str, mask: Image.Image | torch.Tensor) -> torch.Tensor:
    """A mask as (height, width) in 0 to 1. Raises ValueError if it is none."""
    if isinstance(mask, Image.Image):
        mask = torch.from_numpy(np.asarray(mask.convert("L"), dtype=np.float32) / 255)
    if mask.ndim != 2 or not mask.numel() or not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError(f"The mask of '{name}' must be a grey picture, (height, width) in 0 to 1.")
    return mask.double()

"""Convolutions of a U-Net of ComfyUI while adapters have terms beside them, see adapters/separable.py.

Attentions are handed what is known of a pass; convolutions are handed a feature map and nothing else. So it is told
around them, for as long as the model's forward runs, to whatever runs in the same thread.

Letters: B batch, M context tokens, R rank, O channels that go out.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from comcat_diffusion.adapters.separable import across, around
from comcat_diffusion.comfy.attended import Carrying, acting, of_picture
from comcat_diffusion.comfy.guests import Guest, Guests
from comcat_diffusion.comfy.places import PLACES
from comcat_diffusion.comfy.sharing import masked_shares
from comcat_diffusion.comfy.text import SAID, Said


class _Here(threading.local):
    """The pass that this thread is in."""

    options: Mapping = {}
    latent = (0, 0)  # height and width of what is denoised


_here = _Here()


@contextmanager
def passing(options: Mapping, latent: tuple[int, int]) -> Iterator[None]:
    """In this block convolutions know of a pass what its options say, and how large a picture it denoises."""
    before = _here.options, _here.latent
    _here.options, _here.latent = options, latent
    try:
        yield
    finally:
        _here.options, _here.latent = before


class Convolved(Carrying):
    """A convolution's `forward` while adapters have terms beside it."""

    def __init__(self, guests: Guests, name: str, host: nn.Conv2d) -> None:
        super().__init__(guests, host, [name])
        self.host, self.name = host, name

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, O, h', w')."""
        made, options = self.before(hidden), _here.options
        said = options.get(SAID, {})
        live = self.live(self.name, said)
        shares = self._shares([guest.name for guest in live], made, options) if live else {}
        for guest in live:
            weight = guest.scales[self.name] * self._rows(guest, said, made)
            if guest.name in shares:
                weight = weight * shares[guest.name].to(made)
            made = made + self._term(self._on(self.name, hidden.device, guest), hidden, weight)
        return made

    def _term(self, factors: Mapping[str, nn.Linear], hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What a term adds, (B, O, h', w'); weights are of each row, rank and place, or of all."""
        down, taps, up = (factors[f"conv_{name}"].weight.to(hidden) for name in ("down", "taps", "up"))
        host = self.host
        low = around(across(hidden, down), taps, host.stride, host.padding, host.padding_mode)
        return across(low * weight, up)

    def _rows(self, guest: Guest, said: Said, like: torch.Tensor) -> torch.Tensor:
        """Which rows an adapter's ranks act on, (B or 1, R or 1, 1, 1)."""
        acts = acting(guest, guest.waits_beside[self.name], said, of_picture)
        return like.new_ones(1, 1, 1, 1) if acts is None else acts.to(like).mT.unsqueeze(-1)

    def _shares(self, live: list[str], made: torch.Tensor, options: Mapping) -> dict[str, torch.Tensor]:
        """Of each place the share, (B or 1, 1, h', w'), of those adapters that do not act everywhere."""
        grid = tuple(made.shape[2:])
        masks = {name: mask for name, mask in self.guests.masks.items() if name in live}
        shares = masked_shares(self.guests.masks, _here.latent, grid) if masks else {}
        shares = {name: shares[name].unsqueeze(0) for name in masks}
        if PLACES in options:
            named = [name for name in live if name in options[PLACES].called]
            shares |= options[PLACES].shares(named, grid, made, shares)
        return {name: share.mT.unflatten(2, grid) for name, share in shares.items()}

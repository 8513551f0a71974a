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

from comcat_diffusion.adapters.separable import separable
from comcat_diffusion.comfy.attended import Carrying, acting, of_picture
from comcat_diffusion.comfy.guests import Guest, Guests
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
        names, grid = [guest.name for guest in live], tuple(made.shape[2:])
        shares = self.shares(names, options, _here.latent, grid, made) if live else {}
        for guest in live:
            weight = guest.scales[self.name] * self._rows(guest, said, made)
            if guest.name in shares:
                weight = weight * shares[guest.name].to(made).mT.unflatten(-1, grid)  # B or none, 1, h', w'
            made = made + self._term(self._on(self.name, hidden.device, guest), hidden, weight)
        return made

    def _term(self, factors: Mapping[str, nn.Linear], hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What a term adds, (B, O, h', w'); weights are of each row, rank and place, or of all."""
        down, taps, up = (factors[f"conv_{name}"].weight.to(hidden) for name in ("down", "taps", "up"))
        host = self.host
        return separable(hidden, down, taps, up, host.stride, host.padding, host.padding_mode, weight)

    def _rows(self, guest: Guest, said: Said, like: torch.Tensor) -> torch.Tensor:
        """Which rows an adapter's ranks act on, (B or 1, R or 1, 1, 1)."""
        acts = acting(guest, guest.waits_beside[self.name], said, of_picture)
        return like.new_ones(1, 1, 1, 1) if acts is None else acts.to(like).mT.unsqueeze(-1)

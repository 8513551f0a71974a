"""Modules of ComfyUI that are no attentions while adapters have terms beside them, see adapters/beside.py.

Attentions are handed what is known of a pass; these are handed what they compute with and nothing else. So it is told
around them, for as long as the model's forward runs, to whatever runs in the same thread.

Letters: B batch, N tokens or places, R rank.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from comcat_diffusion.comfy.attended import Carrying, Said, acting, of_picture
from comcat_diffusion.comfy.guests import Guest, Guests
from comcat_diffusion.comfy.places import PLACES
from comcat_diffusion.comfy.text import SAID


class _Here(threading.local):
    """The pass that this thread is in."""

    options: Mapping = {}
    latent = (0, 0)  # height and width of what is denoised


_here = _Here()


@contextmanager
def passing(options: Mapping, latent: tuple[int, int]) -> Iterator[None]:
    """In this block such modules know of a pass what its options say, and how large a picture it denoises."""
    before = _here.options, _here.latent
    _here.options, _here.latent = options, latent
    try:
        yield
    finally:
        _here.options, _here.latent = before


class Beside(Carrying):
    """A module's `forward` while adapters have terms beside it: its own, whose output these are added to."""

    def __init__(self, guests: Guests, name: str, host: nn.Module) -> None:
        super().__init__(guests, host, [name])
        self.host, self.name = host, name

    # What each kind says of itself

    def places(
        self, live: list[str], options: Mapping, latent: tuple[int, int], made: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What part of each place which live adapter makes, (N, 1) or (B, N, 1), for those that act by place."""
        raise NotImplementedError

    def laid(self, by_token: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Weights by row, token and rank, (B, N, R) or ones in place of them, as they weigh the ranks of a term."""
        raise NotImplementedError

    def term(self, factors: Mapping[str, nn.Linear], hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What an adapter makes of the host's input, its ranks times a weight: like the host's output."""
        raise NotImplementedError

    # What the host's callers ask

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        made, options = self.before(hidden), _here.options
        said, places = options.get(SAID, {}), options.get(PLACES)
        live = self.live(self.name, said)
        if places is not None and places.at is None:  # the base draws
            live = [guest for guest in live if guest.name not in places.called]
        shares = self.places([guest.name for guest in live], options, _here.latent, made) if live else {}
        for guest in live:
            weight = guest.scales[self.name] * self.laid(self._rows(guest, said, made), made)
            if guest.name in shares:
                share = shares[guest.name].to(made)
                weight = weight * self.laid(share if share.ndim == 3 else share.unsqueeze(0), made)
            made = made + self.term(self._on(self.name, hidden.device, guest), hidden, weight)
        return made

    def _rows(self, guest: Guest, said: Said, like: torch.Tensor) -> torch.Tensor:
        """Which rows an adapter's ranks act on, (B or 1, 1, R or 1)."""
        acts = acting(guest, guest.waits_beside[self.name], said, of_picture)
        return like.new_ones(1, 1, 1) if acts is None else acts.to(like)

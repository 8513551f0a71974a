"""Attentions of a U-Net of ComfyUI while adapters are on them: each gets a forward that runs its own on wider heads.

Letters: B batch, N tokens of the picture, M context tokens, T triggers, C channels.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from comcat_diffusion.adapters.blend import blended
from comcat_diffusion.adapters.regions import beside_words, grid_of
from comcat_diffusion.adapters.seam import View
from comcat_diffusion.adapters.wide import Foldable, Free, WideHeads, shared_out
from comcat_diffusion.comfy.guests import Guest, Guests, OfGuests, Trigger, Waits
from comcat_diffusion.comfy.places import PLACES, Places, looks
from comcat_diffusion.comfy.sharing import PICTURE, masked_shares
from comcat_diffusion.comfy.text import SAID

Said = Mapping[Trigger, torch.Tensor]
Begin = Callable[[int, int, int], int]  # where the picture's begin, of all tokens, places of the picture, and words
Spread = Callable[[torch.Tensor], torch.Tensor]


class Carrying(OfGuests):
    """A forward of ComfyUI's that runs an attention, or several, with the adapters that are on them."""

    own = "forward"

    def __init__(self, guests: Guests, owner: nn.Module, attentions: Sequence[str]) -> None:
        super().__init__(guests, owner)
        self.on = {name: [guest for guest in guests.all if name in guest.factors] for name in attentions}
        self._moved: dict[tuple[str, str, torch.device], dict[str, nn.Linear]] = {}

    def live(self, attention: str, said: Said) -> list[Guest]:
        """The adapters that act on an attention, by what the texts say: (B, M, 1) by trigger that some text has."""
        called = lambda guest: not guest.trigger or any(words in said for words in guest.words)  # noqa: E731
        return [guest for guest in self.on[attention] if guest.scales[attention] != 0 and called(guest)]

    def adapters(
        self, attention: str, live: Sequence[Guest], said: Said, device: torch.device, spread: Spread
    ) -> list[Free | Foldable]:
        """Their factors, and on which tokens they act: what `spread` makes of those of the text."""
        found = []
        for guest in live:
            factors = self._on(attention, device, guest)
            kind = Foldable if "q_core" in factors else Free
            found.append(kind(guest.scales[attention], acting(guest, guest.waits, said, spread), **factors))
        return found

    def shares(
        self, live: list[str], options: Mapping, latent: tuple[int, int], grid: tuple[int, int], like: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Of each place of a grid the share of every adapter that acts and has a mask, (N, 1), or is placed, (B, N, 1).

        One that is placed has its share within its mask; see adapters/regions.py and focus.py.
        """
        masked = [name for name in live if name in self.guests.masks]
        found = masked_shares(self.guests.masks, latent, grid) if masked else {}
        found = {name: found[name] for name in masked}
        if PLACES in options:
            named = [name for name in live if name in options[PLACES].called]
            found |= options[PLACES].shares(named, grid, like, found)
        return found

    def shares_of_tokens(
        self, live: list[str], options: Mapping, like: torch.Tensor, begin: Begin | None
    ) -> dict[str, torch.Tensor]:
        """The same in a transformer, of tokens (B, N, C), among which its picture's begin; None: there are no others.

        Those before them and behind have no place: they have the mean of the picture's.
        """
        if not (self.guests.masks or self.guests.keep_background):
            return {}
        picture, places, around = options[PICTURE], options.get(PLACES), (0, 0)
        if begin is not None:
            tokens, count = like.shape[1], math.prod(picture.grid)
            before = begin(tokens, count, picture.words)
            around = before, tokens - before - count
        found = {name: beside_words(share, *around) for name, share in picture.shares.items() if name in live}
        if places is not None and places.at is not None:
            named = [name for name in live if name in places.called]
            found |= places.shares(named, picture.grid, like, found, around)
        return found

    def _on(self, attention: str, device: torch.device, guest: Guest) -> dict[str, nn.Linear]:
        """An adapter's factors on the device that the attention computes on; they are kilobytes, and stay there."""
        key = (guest.name, attention, device)
        if key not in self._moved:
            copies = _copies(guest.factors[attention])
            self._moved[key] = {name: factor.to(device) for name, factor in copies.items()}
        return self._moved[key]


def acting(guest: Guest, waits: Waits, said: Said, spread: Spread) -> torch.Tensor | None:
    """On which tokens a live adapter's ranks act: what `spread` makes of those of the text; None for all."""
    if not guest.trigger:
        return None
    silent = torch.zeros_like(next(iter(said.values())))
    return spread(shared_out(waits, guest.trigger, lambda words: said.get(words, silent)))


def of_text(tokens: torch.Tensor) -> torch.Tensor:
    """(B, M, R) of text, as they are."""
    return tokens


def of_picture(tokens: torch.Tensor) -> torch.Tensor:
    """(B, 1, R): on a picture that reads no text, or not."""
    return tokens.amax(dim=1, keepdim=True)


class Attended(Carrying):
    """An attention's `forward` while adapters are on it."""

    def __init__(self, guests: Guests, name: str, attention: nn.Module) -> None:
        super().__init__(guests, attention, [name])
        self.attention, self.name = attention, name

    def __call__(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        options = kwargs.get("transformer_options") or {}
        said = options.get(SAID, {})
        live = {guest.name: guest for guest in self.live(self.name, said)}

        def attend(names: list[str]) -> torch.Tensor:
            chosen = [live[name] for name in names]
            host = self._view(chosen, said, hidden.device) if chosen else self.attention
            return type(self.attention).forward(host, hidden, *args, **kwargs)

        shares = {}
        if PLACES in options or self.guests.masks.keys() & live.keys():
            latent = tuple(options["original_shape"][-2:])
            if PLACES in options:
                text = kwargs.get("context", args[0] if args else None)
                self._look(options[PLACES], list(live), hidden, text, latent)
            shares = self.shares(list(live), options, latent, grid_of(latent, hidden.shape[1]), hidden)
        return blended(shares, list(live), hidden, attend) if shares else attend(list(live))

    def _look(
        self,
        places: Places,
        live: list[str],
        hidden: torch.Tensor,
        text: torch.Tensor | None,
        latent: tuple[int, int],
    ) -> None:
        """While the base draws, note where this attention looks at their words; see adapters/focus.py."""
        if places.at is None and looks(self.name):
            for name in live:
                if name in places.called:
                    places.look(name, self.attention, hidden, text, latent)

    def _view(self, live: list[Guest], said: Said, device: torch.device) -> View:
        host, spread = self.attention, of_text if self.name.endswith("attn2") else of_picture
        adapters = self.adapters(self.name, live, said, device, spread)
        text = hasattr(host, "q_proj")
        keys, out = (host.k_proj, host.out_proj) if text else (host.to_k, host.to_out[0])
        wide = WideHeads(host.heads, keys.out_features // host.heads, adapters, True, device.type)
        output = functools.partial(wide.output, out)
        if text:
            q, v = functools.partial(wide.query, host.q_proj), functools.partial(wide.value, host.v_proj)
            return View(host, q_proj=q, k_proj=functools.partial(wide.key, keys), v_proj=v, out_proj=output)
        rest = host.to_out[1:]
        return View(
            host,
            to_q=functools.partial(wide.query, host.to_q),
            to_k=functools.partial(wide.key, keys),
            to_v=functools.partial(wide.value, host.to_v),
            to_out=lambda mixed: rest(output(mixed)),
        )


def _copies(factors: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """The factors as modules of their own, so that a move leaves those of other clones where they are."""
    made = {}
    for name, factor in factors.items():
        made[name] = nn.Linear(factor.in_features, factor.out_features, bias=False, device="meta")
        made[name].weight = nn.Parameter(factor.weight.data, requires_grad=False)
    return made

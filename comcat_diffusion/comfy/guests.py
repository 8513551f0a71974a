"""Adapters that a model of ComfyUI has: what each is, what calls it, and where in the picture it acts.

Letters: M context tokens, T triggers, P adapters that are placed.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from comcat_diffusion.adapters.looking import Called, called_in
from comcat_diffusion.comfy.places import looks, of_both
from comcat_diffusion.comfy.text import SAID, Said

Trigger = tuple[str, ...]
Waits = tuple[tuple[Trigger, int], ...]  # for which words how many ranks wait; none: all for the same


@dataclass(frozen=True)
class Guest:
    """An adapter that was invited: its factors by host, an attention or another module, and how strong it is."""

    name: str
    path: Path
    trigger: Trigger  # words that it waits for; none: it acts everywhere
    waits: Waits  # of its ranks at attentions
    factors: Mapping[str, Mapping[str, nn.Linear]]  # hosts are called as from the model that is patched
    scales: Mapping[str, float]  # by host: strength times alpha / r
    subjects: Trigger = ()  # what its subjects are called in prompts, by which their places are found
    waits_beside: Mapping[str, Waits] = field(default_factory=lambda: MappingProxyType({}))  # by host that is none

    @property
    def attentions(self) -> list[str]:
        """Its hosts that are."""
        return [name for name in self.factors if name not in self.waits_beside]

    @property
    def words(self) -> list[Trigger]:
        """What calls it, or some of its ranks each."""
        return [words for words, _ in self.waits] or ([self.trigger] if self.trigger else [])


@dataclass(frozen=True)
class Guests:
    """All adapters of one model, and where in the picture they act."""

    all: tuple[Guest, ...] = ()
    masks: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))  # (height, width), 0 to 1
    keep_background: bool = False  # whether those that wait for a word act only where it is looked at

    @property
    def placed(self) -> list[Guest]:
        """Those that act only where their subjects are looked at."""
        able = (guest for guest in self.all if guest.trigger and any(map(looks, guest.factors)))
        return list(able) if self.keep_background else []

    @property
    def of_tokens(self) -> bool:
        """Whether their model is a transformer whose picture and text share one softmax."""
        return any(of_both(name) for guest in self.all for name in guest.factors)

    @property
    def triggers(self) -> list[Trigger]:
        """The different triggers, in the order of the masks of tokens."""
        return list(dict.fromkeys(words for guest in self.all for words in guest.words))

    def told(self, said: Said) -> torch.Tensor:
        """What a text says to them, (M, T + 2P) of ones and zeros.

        Where triggers act, which tokens are the words of P subjects, and, alike for all tokens, whether it names the
        subject and says nothing else.
        """
        called = self._called_in(said)
        of_words = [one.of_words[0] for one in called]
        bare = [one.bare.expand_as(own) for one, own in zip(called, of_words, strict=True)]
        return torch.stack([*map(said.acts, self.triggers), *of_words, *bare], dim=-1).float()

    def called(self, told: torch.Tensor) -> dict[str, Called]:
        """The part of that which is about subjects, of B texts, (B, M, T + 2P), by adapter."""
        names = [guest.name for guest in self.placed]
        of_words, bare = told[..., len(self.triggers) :].split(len(names), dim=-1) if names else ((), ())
        return {name: Called(of_words[..., n], bare[..., n].any(1)) for n, name in enumerate(names)}

    def asks(self, conditioning: Mapping) -> bool:
        """Whether a conditioning of ComfyUI names a subject that is placed, and says more."""
        said = conditioning.get(SAID)
        return isinstance(said, Said) and any(one.asks() for one in self._called_in(said))

    def _called_in(self, said: Said) -> list[Called]:
        """Of one text, by the adapters that are placed."""
        return list(called_in([said], {guest.name: guest.subjects for guest in self.placed}).values())


class OfGuests:
    """An object patch of ours. No module, since modules of a model are among its weights."""

    own = ""  # what it stands in the place of

    def __init__(self, guests: Guests, owner: nn.Module, foreign: Callable | None = None) -> None:
        self.guests, self.foreign = guests, foreign
        self.before = foreign or functools.partial(getattr(type(owner), self.own), owner)


def guests_of(patcher: object) -> Guests:
    """The adapters of a `ModelPatcher`."""
    for patch in patcher.object_patches.values():
        if isinstance(patch, OfGuests):
            return patch.guests
    return Guests()


def invited(guests: Guests, guest: Guest) -> Guests:
    """One adapter more. Raises ValueError for one that is there; two of one word are told of."""
    for other in guests.all:
        if other.path == guest.path:
            raise ValueError(f"{guest.path.name} is loaded by another node already: give that one its strength.")
        if other.name == guest.name:
            raise ValueError(f"Two adapters are called '{guest.name}': rename one of the files.")
        both = {word.lower() for word in other.trigger} & {word.lower() for word in guest.trigger}
        if both:
            told = f"'{other.name}' and '{guest.name}' both act from '{min(both)}' on, so their subjects mix"
            logging.warning("COMCAT: %s: give each a part of the picture (COMCAT regions).", told)
    return replace(guests, all=(*guests.all, guest))

"""Adapters on a model of ComfyUI: each attention that they are on gets a forward that runs its own on wider heads.

Letters: B batch, N tokens of the picture, M context tokens, T triggers, P adapters that are placed, C channels.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from comcat_diffusion.adapters.blend import blended
from comcat_diffusion.adapters.looking import placing
from comcat_diffusion.adapters.proportions import refuse_other_shape
from comcat_diffusion.adapters.regions import grid_of
from comcat_diffusion.adapters.seam import View
from comcat_diffusion.adapters.wide import Foldable, Free, WideHeads, shared_out
from comcat_diffusion.comfy.places import PLACES, WAY_UP, Courses, Places
from comcat_diffusion.comfy.text import SAID, Said

_UNET = "diffusion_model"
Trigger = tuple[str, ...]


@dataclass(frozen=True)
class Guest:
    """An adapter that was invited: its factors by attention, and how strong it is."""

    name: str
    path: Path
    trigger: Trigger  # words that it waits for; none: it acts everywhere
    waits: tuple[tuple[Trigger, int], ...]  # of several subjects: for which words how many of its ranks do
    factors: Mapping[str, Mapping[str, nn.Linear]]  # attentions are called as from the model that is patched
    scales: Mapping[str, float]  # by attention: strength times alpha / r
    subjects: Trigger = ()  # what its subjects are called in prompts, by which their places are found

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
        able = (guest for guest in self.all if guest.trigger and any(map(_looks, guest.factors)))
        return list(able) if self.keep_background else []

    @property
    def triggers(self) -> list[Trigger]:
        """The different triggers, in the order of the masks of tokens."""
        return list(dict.fromkeys(words for guest in self.all for words in guest.words))

    def told(self, said: Said) -> torch.Tensor:
        """What a text says to them, (M, T + P) of ones and zeros: where triggers act, and the words of P subjects."""
        of_words = [placing(said, guest.subjects) for guest in self.placed]
        return torch.stack([*map(said.acts, self.triggers), *of_words], dim=-1).float()


def _looks(attention: str) -> bool:
    """Whether an attention looks at words from where the things are, see adapters/looking.py."""
    return attention.startswith(WAY_UP) and attention.endswith("attn2")


def guests_of(patcher: object) -> Guests:
    """The adapters of a `ModelPatcher`."""
    for patch in patcher.object_patches.values():
        if isinstance(patch, _OfGuests):
            return patch.guests
    return Guests()


def seated(patcher: object, guests: Guests) -> object:
    """A clone of a `ModelPatcher` with these adapters, and no others; the one that is given stays as it is.

    Raises ValueError if another node has put a forward of its own in the place of an attention's.
    """
    made = patcher.clone()
    model, patches = made.model, made.object_patches
    for name in [name for name, patch in patches.items() if isinstance(patch, _OfGuests)]:
        ours = patches.pop(name)
        if ours.foreign is not None:
            patches[name] = ours.foreign
    for name in dict.fromkeys(name for guest in guests.all for name in guest.factors):
        if f"{name}.forward" in patches:
            raise ValueError(f"Another node has changed {name} already: load the COMCAT adapter before it.")
        made.add_object_patch(f"{name}.forward", Attended(guests, name, model.get_submodule(name)))
    if hasattr(model, _UNET):
        for name, kind, owner in (
            ("extra_conds", _Conditions, model),
            (f"{_UNET}.forward", _Passed, getattr(model, _UNET)),
        ):
            if hasattr(type(owner), kind.own):  # Forge has no extra_conds, see comfy/forge.py
                made.add_object_patch(name, kind(guests, owner, patches.get(name)))
    return made


class _OfGuests:
    """An object patch of ours. No module, since modules of a model are among its weights."""

    own = ""  # what it stands in the place of

    def __init__(self, guests: Guests, owner: nn.Module, foreign: Callable | None = None) -> None:
        self.guests, self.foreign = guests, foreign
        self.before = foreign or functools.partial(getattr(type(owner), self.own), owner)


class _Conditions(_OfGuests):
    """`extra_conds`: what a conditioning says goes along with its text states, row by row, however they are stacked."""

    own = "extra_conds"

    def __call__(self, **kwargs: object) -> dict:
        made = self.before(**kwargs)
        if not self.guests.triggers or kwargs.get("cross_attn") is None:
            return made
        length, said = kwargs["cross_attn"].shape[1], kwargs.get(SAID)
        if not isinstance(said, Said):
            raise ValueError(
                "This conditioning does not say what it was made of, and a COMCAT adapter waits for "
                f"'{self.guests.triggers[0][0]}': give the text encoder the CLIP that Load COMCAT adapter gives, or "
                "use COMCAT text encode."
            )
        acts = self.guests.told(said)
        if len(acts) != length:
            raise ValueError(
                f"This conditioning has {length} tokens and its text {len(acts)}, so another node has changed it: join "
                "texts with BREAK in COMCAT text encode instead."
            )
        if kwargs.get("prompt_type") == "positive":
            for words, own in zip(self.guests.triggers, acts.unbind(-1), strict=False):
                if not own.any():
                    logging.warning("COMCAT: the prompt lacks '%s', so that adapter does nothing here.", words[-1])
        cross = made["c_crossattn"]
        return made | {SAID: type(cross)(acts.unsqueeze(0).to(cross.cond.device))}


class _Passed(_OfGuests):
    """The U-Net's `forward`: hands what the texts say on to its attentions."""

    own = "forward"

    def __init__(self, guests: Guests, owner: nn.Module, foreign: Callable | None = None) -> None:
        super().__init__(guests, owner, foreign)
        self.courses = Courses()

    def __call__(self, *args: object, transformer_options: dict | None = None, **kwargs: object) -> torch.Tensor:
        options = dict(transformer_options or {})
        acts = kwargs.pop(SAID, None)
        taken = options.get("patches_replace", {})
        crossed = {name.rpartition(".")[2] for guest in self.guests.all for name in guest.factors}
        for kind in sorted(crossed & {kind for kind, by_block in taken.items() if by_block}):
            raise ValueError(
                f"Another node replaces the attentions ({kind}) that a COMCAT adapter is on, which would be silent: "
                "leave that node out, or the adapter."
            )
        triggers, placed = self.guests.triggers, self.guests.placed
        columns = () if acts is None else acts.split(1, dim=-1)  # B, M, 1 each
        options[SAID] = {words: own for words, own in zip(triggers, columns, strict=False) if own.any()}
        names = [guest.name for guest in placed]
        of_words = dict(zip(names, (own.squeeze(-1) for own in columns[len(triggers) :]), strict=False))
        if not any(own.any() for own in of_words.values()):
            return self.before(*args, transformer_options=options, **kwargs)

        options[PLACES] = places = Places(of_words)

        def run(once_more: bool) -> torch.Tensor:
            given = _for_another(kwargs) if once_more else kwargs
            return self.before(*args, transformer_options=dict(options), **given)

        return self.courses.step(args[0] if args else kwargs["x"], options, places, run)


def _for_another(kwargs: dict) -> dict:
    """What a pass takes before another one: ComfyUI takes what a ControlNet says out of its lists."""
    control = kwargs.get("control")
    return {**kwargs, "control": {name: list(own) for name, own in control.items()}} if control else kwargs


class Attended(_OfGuests):
    """An attention's `forward` while adapters are on it."""

    own = "forward"

    def __init__(self, guests: Guests, name: str, attention: nn.Module) -> None:
        super().__init__(guests, attention)
        self.attention = attention
        self.here = {guest.name: guest for guest in guests.all if name in guest.factors}
        self.name = name
        self._moved: dict[tuple[str, torch.device], dict[str, nn.Linear]] = {}

    def __call__(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        options = kwargs.get("transformer_options") or {}
        said = options.get(SAID, {})  # by trigger: (B, M, 1), of those that some text has
        live = [name for name, guest in self.here.items() if self._acts(guest, said)]

        def attend(names: list[str]) -> torch.Tensor:
            host = self._view(names, said, hidden.device) if names else self.attention
            return type(self.attention).forward(host, hidden, *args, **kwargs)

        shares = self._shares(live, hidden, options)
        if PLACES in options:
            text = kwargs.get("context", args[0] if args else None)
            shares = self._placed(shares, live, hidden, text, options[PLACES], tuple(options["original_shape"][-2:]))
        return blended(shares, live, hidden, attend) if shares else attend(live)

    def _acts(self, guest: Guest, said: Mapping[Trigger, torch.Tensor]) -> bool:
        return guest.scales[self.name] != 0 and (not guest.trigger or any(words in said for words in guest.words))

    def _shares(self, live: list[str], hidden: torch.Tensor, options: Mapping) -> dict[str, torch.Tensor]:
        """Of N tokens the share, (N, 1), of every adapter that acts and has a mask; see adapters/regions.py."""
        masked = [name for name in live if name in self.guests.masks]
        if not masked:
            return {}
        latent = tuple(options["original_shape"][-2:])
        for name in masked:
            refuse_other_shape(name, self.guests.masks[name], *latent)
        grid = grid_of(latent, hidden.shape[1])
        areas = {n: adaptive_avg_pool2d(m[None], grid).view(-1, 1) for n, m in self.guests.masks.items()}
        crowd = sum(areas.values()).clamp(min=1)
        return {name: areas[name] / crowd for name in masked}

    def _placed(
        self,
        masked: dict[str, torch.Tensor],
        live: list[str],
        hidden: torch.Tensor,
        text: torch.Tensor | None,
        places: Places,
        latent: tuple[int, int],
    ) -> dict[str, torch.Tensor]:
        """Shares, (B, N, 1), of those too that act where they are looked at, within their masks; see focus.py."""
        named = [name for name in live if name in places.of_words]
        for name in named if places.looking and _looks(self.name) else ():
            places.look(name, self.attention, hidden, text, latent)
        return {**masked, **places.shares(named, latent, hidden, masked)}

    def _view(self, names: list[str], said: Mapping[Trigger, torch.Tensor], device: torch.device) -> View:
        host, of_text = self.attention, self.name.endswith("attn2")
        adapters = []
        for name in names:
            guest = self.here[name]
            tokens = None
            if guest.trigger:
                silent = torch.zeros_like(next(iter(said.values())))
                tokens = shared_out(guest.waits, guest.trigger, lambda words: said.get(words, silent))  # noqa: B023
            if tokens is not None and not of_text:
                tokens = tokens.amax(dim=1, keepdim=True)  # a self-attention reads no text: on its pictures, or not
            factors = self._on(device, guest)
            kind = Foldable if "q_core" in factors else Free
            adapters.append(kind(guest.scales[self.name], tokens, **factors))
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

    def _on(self, device: torch.device, guest: Guest) -> dict[str, nn.Linear]:
        """An adapter's factors on the device that the attention computes on; they are kilobytes, and stay there."""
        if (guest.name, device) not in self._moved:
            self._moved[guest.name, device] = {
                name: factor.to(device) for name, factor in _copies(guest.factors[self.name]).items()
            }
        return self._moved[guest.name, device]


def _copies(factors: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """The factors as modules of their own, so that a move leaves those of other clones where they are."""
    made = {}
    for name, factor in factors.items():
        made[name] = nn.Linear(factor.in_features, factor.out_features, bias=False, device="meta")
        made[name].weight = nn.Parameter(factor.weight.data, requires_grad=False)
    return made


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

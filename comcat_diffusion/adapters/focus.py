"""Adapters that act where in the picture their subject is, found by the model itself: the background stays the base's.

A U-Net's cross-attentions on the way up look at a subject's words from where the subject is, from the first step on. So
at each step the base predicts first, and shows meanwhile where it looks; then the adapters predict, and

    prediction = base + w (adapters - base)        w: how much a place looks at the subject's words, see looking.py

Pictures whose prompts have none of the words are the base's, and take no second pass: with guidance a step costs half
as much again. Where several adapters have their words in one prompt, they share each place as it looks at their words.

Letters: B batch, N = h*w tokens of one attention, M context tokens, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import nn

from comcat_diffusion.adapters.call import Follower, given, here
from comcat_diffusion.adapters.gate import Heard
from comcat_diffusion.adapters.layer import ComcatLayer
from comcat_diffusion.adapters.looking import Course, divided, looks, on_the_way_up, placing, weights_of
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.regions import grid_of
from comcat_diffusion.families.known import family_of_model
from comcat_diffusion.words import says_more


@dataclass(frozen=True)
class _Base:
    """What the base has said of one step: its prediction (B, C, h, w), and where words were looked at until now."""

    predicted: torch.Tensor
    seen: Mapping[str, torch.Tensor]  # (B, 1, h, w) by adapter
    rows: list[int]  # pictures that the adapters predict as well

    def with_adapters(self, predicted: torch.Tensor) -> torch.Tensor:
        """The prediction of all pictures, given that of `rows` with the adapters."""
        weights = sum(weights_of(seen[self.rows]) for seen in self.seen.values()).clamp(max=1).to(predicted)
        made = self.predicted.clone()
        made[self.rows] = torch.lerp(made[self.rows], predicted, weights)
        return made


@dataclass
class _Drawing:
    """What is known of pictures as long as their texts stay the same objects, from step to step."""

    heard: Heard
    rows: list[int]  # pictures that have words of adapters; none, where no text asks for anything around a subject
    of_words: Mapping[str, torch.Tensor]  # (B, M) of bool by adapter, see `placing`
    course: Course = field(default_factory=Course)
    of_rows: Heard | None = None  # what the texts of `rows` say
    picked: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # what was given, and of `rows`

    @classmethod
    def of(cls, heard: Heard, words: Mapping[str, Sequence[str]]) -> Self:
        """Of texts that were heard, for adapters that are called by these words."""
        asked = any(one.within(own).any() and says_more(one.text, own) for one in heard.said for own in words.values())
        of_words = {name: torch.stack([placing(one, own) for one in heard.said]) for name, own in words.items()}
        called = torch.stack([found.any(1) for found in of_words.values()]).any(0)  # B
        return cls(heard, called.nonzero().flatten().tolist() if asked else [], of_words)

    def pick(self, whole: object, count: int) -> object:
        """Of what a denoiser is given for `count` pictures, what is of `rows`; one object stays one object."""
        before, self.picked = self.picked, {}
        return self._pick(whole, count, before)

    def _pick(self, whole: object, count: int, before: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> object:
        if isinstance(whole, torch.Tensor):
            if whole.ndim == 0 or len(whole) != count:
                return whole
            known, part = before.get(id(whole), (None, None))
            self.picked[id(whole)] = whole, part if known is whole else whole[self.rows]
            return self.picked[id(whole)][1]
        if isinstance(whole, dict):
            return {name: self._pick(one, count, before) for name, one in whole.items()}
        if isinstance(whole, list | tuple):
            return type(whole)([self._pick(one, count, before) for one in whole])
        return whole


class Focus(Follower):
    """The words of some adapters, and what the base has said of the step that is being taken."""

    def __init__(self, words: Mapping[str, Sequence[str]], looking: Sequence[ComcatLayer] = ()) -> None:
        super().__init__()
        self.words, self.looking = words, looking
        self._drawing: _Drawing | None = None
        self._base: _Base | None = None
        self._seen: dict[str, list[torch.Tensor]] | None = None  # while the base predicts, layer by layer

    def made_of(self) -> tuple:
        """See `Follower`."""
        return self.words, self.looking

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The hook before the denoiser: the base predicts, and what follows is of pictures with the words alone."""
        if here.focus is not self:  # another thread's, which shares the denoiser
            return None
        sample = args[0] if args else kwargs["sample"]
        here.latent = tuple(sample.shape[-2:])
        if self._seen is not None or here.heard is None or here.heard.said is None:
            return None
        if self._drawing is None or self._drawing.heard is not here.heard:
            self._drawing = _Drawing.of(here.heard, self.words)
        drawing = self._drawing
        base = self._predict(model, args, kwargs) if drawing.rows else None
        if base is None or not base.seen:  # nothing is asked for, or no adapter is at work
            return None
        self._base = base
        if len(drawing.rows) == len(sample):
            return None
        args, kwargs = drawing.pick((args, kwargs), len(sample))
        if drawing.of_rows is None:
            states = family_of_model(model).heard(given(model, args, kwargs))
            drawing.of_rows = drawing.heard.of(drawing.rows, states)
        here.heard = drawing.of_rows
        return args, kwargs

    def _predict(self, model: nn.Module, args: tuple, kwargs: dict) -> _Base:
        """What the base says, with no adapter that is placed anywhere."""
        known = here.heard, here.latent
        self._seen = {}
        try:
            predicted = model(*args, **kwargs)[0]
            seen = {name: torch.stack(maps).mean(0) for name, maps in self._seen.items()}
            noise = torch.as_tensor(given(model, args, kwargs)["timestep"]).max().item()
            return _Base(predicted, self._drawing.course.step(noise, seen), self._drawing.rows)
        finally:
            self._seen = None
            here.heard, here.latent = known  # which that pass took for its own, and forgot

    @torch.compiler.disable
    def end(self, model: nn.Module, args: tuple, output: object) -> object:
        """The hook after it: around the subjects the prediction is the base's."""
        if here.focus is not self or self._seen is not None:
            return None
        base, self._base, here.latent = self._base, None, None
        if base is None or output is None:  # nothing was placed, or the pass failed
            return None
        made = base.with_adapters(output[0])
        return (made, *output[1:]) if isinstance(output, tuple) else type(output)(sample=made)

    def shares(
        self,
        layer: ComcatLayer,
        live: list[str],
        hidden: torch.Tensor,
        text: torch.Tensor | None,
        masked: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Live adapters' shares of each place of an attention, (B, N, 1), within their masks where they have one.

        While the base predicts that is nothing. Raises ValueError where the denoiser has not begun, or N tokens are no
        level of it.
        """
        if here.latent is None:
            raise ValueError("Adapters act by place while the whole denoiser runs, which shows them the picture.")
        named = [name for name in live if name in self.words]
        if self._seen is not None:
            if layer in self.looking and text is not None:
                for name in named:
                    of_words = self._drawing.of_words[name].to(hidden)
                    found = looks(layer.owner, hidden, text, of_words, here.latent)
                    self._seen.setdefault(name, []).append(found)
            return {**masked, **{name: hidden.new_zeros(1, hidden.shape[1], 1) for name in named}}
        if self._base is None or len(self._base.seen) < 2:
            return dict(masked)
        seen = {name: one[self._base.rows] for name, one in self._base.seen.items()}  # also of who is not in this one
        found = divided(seen, grid_of(here.latent, hidden.shape[1]), masked)
        return {**masked, **{name: found[name] for name in named}}


@contextmanager
def keep_background(pipe: object, words: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """In this block, and thread, adapters of a U-Net act where in the picture their words are looked at.

    Everything else stays the base's. `words` are what each adapter's subject is called by, like {"dog": ["sks dog"]};
    adapters that are not named act as ever, and so do those that are in pictures whose prompts say nothing else. Each
    step takes the base as well, so this is for drawing. Raises ValueError for an adapter that is not there, waits for
    no trigger, or is in none of the attentions that look.
    """
    layers = adapted_layers(denoiser(pipe))
    looking = [layers[name] for name in on_the_way_up({name: layer.owner for name, layer in layers.items()})]
    _refuse(words, layers, looking)
    focus = Focus(words, looking)
    focus.follow(denoiser(pipe), layers.values())
    before, here.focus = here.focus, focus
    try:
        yield
    finally:
        here.focus = before
        focus.stop()


def placeable(pipe: object, words: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Of these adapters and their words those that `keep_background` can place; the others act as ever."""
    layers = adapted_layers(denoiser(pipe))
    if any(layer.merged for layer in layers.values()):
        return {}
    looking = [layers[name] for name in on_the_way_up({name: layer.owner for name, layer in layers.items()})]
    found = {}
    for name, said in words.items():
        waits = any(layer.trigger.get(name) for layer in layers.values())
        if said and waits and any(name in layer.r for layer in looking):
            found[name] = said
    return found


def _refuse(
    words: Mapping[str, Sequence[str]], layers: Mapping[str, ComcatLayer], looking: Sequence[ComcatLayer]
) -> None:
    for name in words:
        if not any(layer.trigger.get(name) for layer in layers.values()):
            raise ValueError(
                f"'{name}' is no adapter here that waits for a trigger, so nothing tells which words to look for."
            )
        if not any(name in layer.r for layer in looking):
            raise ValueError(
                f"'{name}' is on no cross-attention of a U-Net's way up, which show from where a word is looked at: "
                "train it with the default targets, or give it a mask (set_regions, --region)."
            )

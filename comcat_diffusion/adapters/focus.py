"""Adapters that act where in the picture their subject is, found by the model itself: the background stays the base's.

A picture is drawn twice from the same noise. First by the base alone, whose predictions are kept, and whose
attentions (a U-Net's on the way up, a transformer's of picture and text) look at the subject's words from where it puts
the subject. Then with the adapters, and

    prediction = base + w (adapters - base)        base: of the same step; w: how much a place looked at the words

so that around the subject, where w is zero, the latents are those of the base's own picture at every step, with any
scheduler that takes each place by itself; see looking.py for w. Where several adapters have their words in one prompt,
they share each place as it looked at their words. Nothing is drawn twice where no prompt asks for anything around a
subject.

Letters: B batch of the denoiser, P pictures, N = h*w tokens of one attention, M context tokens, C channels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from comcat_diffusion.adapters.asking import shares_softmax
from comcat_diffusion.adapters.call import Follower, given, here
from comcat_diffusion.adapters.gate import Heard
from comcat_diffusion.adapters.layer import ComcatLayer
from comcat_diffusion.adapters.looking import (
    Called,
    Looked,
    called_in,
    divided,
    look,
    looking_among,
    spread,
    weights_of,
)
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.regions import beside_words, grid_of, words_in
from comcat_diffusion.families.known import family_of_model

OUTSIDE = "Adapters act by place while the whole denoiser runs, which shows them the picture."


class Focus(Follower):
    """What the base alone has drawn, while it does and afterwards: its steps, and where the words of adapters are."""

    def __init__(self, words: Mapping[str, Sequence[str]], looking: Sequence[ComcatLayer] = ()) -> None:
        super().__init__()
        self.words, self.looking = words, looking
        self.asked: bool | None = None  # whether there is a background to keep; None: nothing was drawn yet
        self._heard: Heard | None = None
        self._called: dict[str, Called] = {}  # what that says, by adapter
        self._steps: list[tuple[float, torch.Tensor]] = []  # of the base: noise, and what it predicts, (B, C, h, w)
        self._looked = {name: Looked() for name in words}
        self._at: dict[str, torch.Tensor] | None = None  # (P, 1, h, w), 0 to 1, by adapter, once the base has drawn
        self._weights: torch.Tensor | None = None  # (P, 1, h, w), 0 to 1: how much of all adapters is drawn
        # Of the step that is being taken: its noise, where each layer looks, (B, 1, h, w), and how many came before
        self._noise, self._seen, self._taken = 0.0, {}, 0

    def made_of(self) -> tuple:
        """See `Follower`."""
        return self.words, self.looking

    def place(self, count: int) -> None:
        """The base has drawn so many pictures, and adapters follow."""
        self._at = {name: looked.at(count) for name, looked in self._looked.items() if looked.rows}
        of_tokens = any(shares_softmax(layer.owner) for layer in self.looking)
        if self._at:
            self._weights = sum(weights_of(at, of_tokens) for at in self._at.values()).clamp(max=1)

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """The hook before the denoiser. Raises ValueError where it is another step than the base has taken."""
        if here.focus is not self:  # another thread's, which shares the denoiser
            return
        family, call = family_of_model(model), given(model, args, kwargs)
        here.latent = family.size(call)
        if here.heard is None or here.heard.said is None:
            return
        noise = torch.as_tensor(family.time(call)).max().item()
        if self._at is None:
            if self._heard is not here.heard:
                self._heard, self._called = here.heard, called_in(here.heard.said, self.words)
            # Some pipelines ask for what is subtracted in a pass of its own, which names nobody and decides nothing.
            if self.asked is None and any(one.of_words.any() for one in self._called.values()):
                self.asked = any(one.asks() for one in self._called.values())
            self._noise, self._seen = noise, {}
            return
        known, base = self._steps[self._taken] if self._taken < len(self._steps) else (None, None)
        if known != noise or len(base) != len(family.heard(call)):
            raise ValueError(
                "With the adapter this sampler takes other steps than without, so the background cannot be kept: take "
                "one whose steps are fixed, or draw without keep_background."
            )

    @torch.compiler.disable
    def end(self, model: nn.Module, args: tuple, output: object) -> object:
        """The hook after it: around the subjects the prediction is the base's."""
        if here.focus is not self:
            return None
        here.latent = None
        if output is None or self.asked is False:  # the pass failed; or nothing is to be kept
            return None
        if self._at is None:
            self._steps.append((self._noise, output[0]))
            for name, maps in self._seen.items():
                self._looked[name].note(torch.stack(maps).mean(0), self._called[name])
            return None
        _, base = self._steps[self._taken]
        self._taken += 1
        made = output[0]
        if self._weights is not None:
            made = spread(base, made, _of_rows(self._weights, len(base)))
        return (made, *output[1:]) if isinstance(output, tuple) else type(output)(sample=made)

    @torch.compiler.disable  # which would take what stands on this object for what it was at the first step
    def shares(
        self,
        layer: ComcatLayer,
        live: list[str],
        args: tuple,
        kwargs: Mapping[str, object],
        masked: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Live adapters' shares of each place of an attention, (B, N, 1), within their masks where they have one.

        While the base draws that is nothing. Raises ValueError where the denoiser has not begun, or N tokens are no
        level of it.
        """
        if here.latent is None:
            raise ValueError(OUTSIDE)
        hidden = args[0] if args else kwargs["hidden_states"]  # B, N, C
        named = [name for name in live if name in self.words]
        nothing = hidden.new_zeros(1, hidden.shape[1], 1)
        if self._at is None and self.asked:
            for name in named if layer in self.looking else ():
                of_words = self._called[name].of_words.to(hidden)
                looked = look(layer.owner, args, kwargs, of_words, here.latent, here.words_at)
                self._seen.setdefault(name, []).append(looked)
            return {**masked, **dict.fromkeys(named, nothing)}
        around = words_in(here.latent, hidden.shape[1], here.words_at) if layer.style.stream else (0, 0)
        return self._divided(live, hidden, masked, around)

    @torch.compiler.disable
    def beside(
        self, live: list[str], places: torch.Tensor, masked: Mapping[str, torch.Tensor], stream: bool = False
    ) -> dict[str, torch.Tensor]:
        """As `shares`, (B, N, 1), of what is no attention: nothing looks at words there. It makes (B, N, C) of places.

        In a `stream` words stand beside these, as in attentions over one.
        """
        if here.latent is None:
            raise ValueError(OUTSIDE)
        if self._at is None and self.asked:
            named = [name for name in live if name in self.words]
            return {**masked, **dict.fromkeys(named, places.new_zeros(1, places.shape[1], 1))}
        around = words_in(here.latent, places.shape[1], here.words_at) if stream else (0, 0)
        return self._divided(live, places, masked, around)

    def _divided(
        self,
        live: list[str],
        hidden: torch.Tensor,
        masked: Mapping[str, torch.Tensor],
        around: tuple[int, int] = (0, 0),
    ) -> dict[str, torch.Tensor]:
        """Shares once the base has drawn: what is around a subject is kept by the predictions, so one has all of it."""
        if not self._at or len(self.words) < 2:
            return dict(masked)
        at = {name: _of_rows(one, len(hidden)) for name, one in self._at.items()}  # also of who is not in this one
        found = divided(at, grid_of(here.latent, hidden.shape[1] - sum(around)))
        found = {name: beside_words(one, *around) * masked.get(name, 1) for name, one in found.items()}
        nothing = hidden.new_zeros(1, hidden.shape[1], 1)
        return {**masked, **{name: found.get(name, nothing) for name in live if name in self.words}}


def _of_rows(of_pictures: torch.Tensor, rows: int) -> torch.Tensor:
    """For each of the denoiser's rows what is of its picture: pipelines put all of them one after the other, again."""
    return of_pictures[torch.arange(rows) % len(of_pictures)]


def keep_background(pipe: object, words: Mapping[str, Sequence[str]], *args: object, **kwargs: object) -> object:
    """What `pipe(*args, **kwargs)` returns, drawn so that around the subjects everything is as the base draws it.

    `words` are what each adapter's subject is called by, like {"dog": ["sks dog"]}; adapters that are not named act as
    ever, and so do those that are in pictures whose prompts say nothing else. The pipeline, of a U-Net or of a
    transformer of joint attention, is called twice with the same noise. Raises ValueError for an adapter that is not
    there, waits for no trigger, or is in none of the attentions that look, and for a sampler that takes other steps the
    second time.
    """
    layers = adapted_layers(denoiser(pipe))
    looking = _looking(layers)
    _refuse(words, layers, looking)
    focus = Focus(words, looking)
    focus.follow(denoiser(pipe), layers.values())
    before, here.focus = here.focus, focus
    try:
        noise = _noise_of(pipe, kwargs.get("generator"))
        alone = pipe(*args, **kwargs)
        if not focus.asked:  # no prompt has the words, or one says nothing else
            return alone
        for generator, state in noise:
            generator.set_state(state)
        focus.place(len(alone[0]))
        return pipe(*args, **kwargs)
    finally:
        here.focus = before
        focus.stop()


def _noise_of(pipe: object, generators: object) -> list[tuple[torch.Generator, torch.Tensor]]:
    """The generators that a pipeline draws its noise from, if it is given these, and where they are."""
    if generators is None:
        generators = [torch.default_generator, *(torch.cuda.default_generators if pipe.device.type == "cuda" else ())]
    elif isinstance(generators, torch.Generator):
        generators = [generators]
    return [(generator, generator.get_state()) for generator in generators]


def placeable(pipe: object, words: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Of these adapters and their words those that `keep_background` can place; the others act as ever."""
    layers = adapted_layers(denoiser(pipe))
    if any(layer.merged for layer in layers.values()):
        return {}
    looking = _looking(layers)
    found = {}
    for name, said in words.items():
        waits = any(layer.trigger.get(name) for layer in layers.values())
        if said and waits and any(name in layer.r for layer in looking):
            found[name] = said
    return found


def _looking(layers: Mapping[str, ComcatLayer]) -> list[ComcatLayer]:
    return [layers[name] for name in looking_among({name: layer.owner for name, layer in layers.items()})]


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
                f"'{name}' is on no attention that shows from where a word is looked at (of a U-Net's way up, or of a "
                "transformer's picture and text together): train it with the default targets, or give it a mask "
                "(set_regions, --region)."
            )

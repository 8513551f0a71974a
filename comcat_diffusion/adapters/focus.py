"""Adapters that act where in the picture their subject is, found by the model itself: the background stays the base's.

A U-Net's cross-attentions on the way up look at a subject's words from where the subject is, from the first step on. So
each step weighs an adapter at every place by how much that place looked at its words in the step before,

    w = clamp((r - LOW) / (HIGH - LOW), 0, 1)        r = sum_j P_j / max over places of it        j: tokens of the words

with P the base's own attention, a mean over heads and layers. Before the first step nothing has been looked at yet: the
base takes it alone, only to look, and then it is taken again with the adapters. That is one more pass in a drawing.

Letters: B batch, N = h*w tokens of one attention, M context tokens, H heads, D head width, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from comcat_diffusion.adapters.call import Follower, here
from comcat_diffusion.adapters.layer import ComcatLayer
from comcat_diffusion.adapters.looking import looks, on_the_way_up, shared_by, weights_of
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.regions import grid_of


class Focus(Follower):
    """The words of some adapters, and from where in a batch of pictures these have been looked at."""

    def __init__(self, words: Mapping[str, Sequence[str]], looking: Sequence[ComcatLayer] = ()) -> None:
        super().__init__()
        self.words, self.looking = words, looking
        self._heard: object = None  # the text of the pictures that are being drawn
        self._maps: dict[str, torch.Tensor] = {}  # (B, 1, h, w) by adapter, of the step before
        self._seen: dict[str, list[torch.Tensor]] = {}  # of this step, layer by layer

    def made_of(self) -> tuple:
        """See `Follower`."""
        return self.words, self.looking

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """The hook before the denoiser: the shape of the picture, and of other pictures than before a first look."""
        if here.focus is self:  # and not another thread's, which shares the denoiser
            sample = args[0] if args else kwargs["sample"]
            here.latent = tuple(sample.shape[-2:])
            if self._heard is not here.heard:
                self._heard, self._maps = here.heard, {}
                if self._asked():
                    self._look(model, args, kwargs)

    def _asked(self) -> bool:
        """Whether any of the texts has any of the words."""
        texts = here.heard.said if here.heard is not None and here.heard.said is not None else ()
        return any(bool(said.placing(words).any()) for said in texts for words in self.words.values())

    def _look(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Let the base look: no adapter that is placed acts anywhere yet."""
        known = here.heard, here.latent
        try:
            model(*args, **kwargs)
        finally:
            here.heard, here.latent = known  # which that pass took for its own, and forgot

    @torch.compiler.disable
    def end(self, model: nn.Module, args: tuple, output: object) -> None:
        """The hook after it: what was seen is where the next step acts."""
        if here.focus is self:
            self._maps = {name: torch.stack(maps).mean(0) for name, maps in self._seen.items()}
            self._seen, here.latent = {}, None

    def shares(
        self,
        layer: ComcatLayer,
        live: list[str],
        hidden: torch.Tensor,
        text: torch.Tensor | None,
        masked: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Every live adapter's share of each place of an attention, (B, N, 1), within its mask where it has one.

        Raises ValueError where the denoiser has not begun, or N tokens are no level of it.
        """
        if here.latent is None:
            raise ValueError("Adapters act by place while the whole denoiser runs, which shows them the picture.")
        named = [name for name in live if name in self.words]
        grid = grid_of(here.latent, hidden.shape[1])
        if layer in self.looking and text is not None:
            for name in named:
                of_words = torch.stack([said.placing(self.words[name]) for said in here.heard.said]).to(hidden)
                self._seen.setdefault(name, []).append(looks(layer.owner, hidden, text, of_words, here.latent))
        return shared_by({name: self._weights(name, grid, hidden) for name in named}, masked, hidden)

    def _weights(self, name: str, grid: tuple[int, int], hidden: torch.Tensor) -> torch.Tensor:
        seen = self._maps.get(name)
        if seen is None or len(seen) != len(hidden):
            return hidden.new_zeros(len(hidden), hidden.shape[1], 1)
        return weights_of(seen, grid).to(hidden)  # B, N, 1


@contextmanager
def keep_background(pipe: object, words: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """In this block, and thread, adapters of a U-Net act where in the picture their words are looked at.

    Everything else stays the base's. `words` are what each adapter's subject is called by, like {"dog": ["sks dog"]};
    adapters that are not named act as ever. What one step has seen is for the next, so this is for drawing. Raises
    ValueError for an adapter that is not there, waits for no trigger, or is in none of the attentions that look.
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

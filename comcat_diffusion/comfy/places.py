"""Where in the picture adapters act, found by the model itself, in ComfyUI: as adapters/focus.py does it in diffusers.

A wrapper around the whole sampling takes it twice with the same noise: first the base alone, whose predictions are
kept, and whose looks at the subjects' words say where they are; then the adapters, mixed with what the base predicted
at the same step. ComfyUI puts conditionings into one pass of its U-Net, or several, as memory allows, so that what
belongs to one of them, a chunk, is known by its noise, conditioning and turn. What is known of a drawing goes along in
the options of its sampling, and nothing stands on the model.

A transformer, whose picture and text share one softmax, is asked as in adapters/asking.py: ComfyUI lets one stand in
the place of its attention function, which is called once more with other values.

Letters: B batch, N = h*w tokens of one attention, M context tokens, C channels, P pictures, H heads, D head width.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import pad

from comcat_diffusion.adapters.asking import looked_by, told_of
from comcat_diffusion.adapters.looking import Called, Looked, divided, looks_of, spread, weights_of
from comcat_diffusion.adapters.regions import beside_words
from comcat_diffusion.comfy.sharing import PICTURE

PLACES = "comcat_places"  # key in a model's options: of a sampling its `Drawing`, of a pass its `Places`
OUTER_SAMPLE = "outer_sample"  # ComfyUI's name of the wrappers around a whole sampling
ATTENTION = "optimized_attention_override"  # its key of what stands in the place of an attention function
_WAY_UP = re.compile(r"diffusion_model\.output_blocks\..*attn2")
_OF_BOTH = re.compile(  # of picture and text
    r"diffusion_model\.((double|single)_blocks\.\d+|joint_blocks\.\d+\.context_block\.attn|layers\.\d+\.attention|"
    r"transformer_blocks\.\d+\.attn)"
)


def looks(attention: str) -> bool:
    """Whether an attention looks at words from where the things are, see adapters/looking.py."""
    return bool(_WAY_UP.fullmatch(attention)) or of_both(attention)


def of_both(attention: str) -> bool:
    """Whether an attention is over the picture's tokens and the text's at once."""
    return bool(_OF_BOTH.fullmatch(attention))


class LookedEnough(Exception):
    """An attention was asked where it looks, and for nothing else."""


class Places:
    """One pass: where each adapter's words are looked at while the base predicts, or were when it did."""

    def __init__(
        self, called: Mapping[str, Called], at: Mapping[str, torch.Tensor] | None, grid: tuple[int, int] = (0, 0)
    ) -> None:
        self.called = called
        self.at = at  # r of each of the B rows, (B, 1, h, w), by adapter; None while the base draws
        self.grid = grid  # of a transformer's tokens of the picture
        self.seen: dict[str, list[torch.Tensor]] = {}

    def watching(
        self, options: Mapping, names: Sequence[str], begin: Callable[[int, int, int], int], on: bool = True
    ) -> dict:
        """A transformer's options, in which an attention over picture and text notes where it looks at adapters' words.

        `begin` says where among N tokens the picture's h*w begin, behind M words. If it shall not go `on`, the forward
        that it is called in ends there, by LookedEnough.
        """
        there, count = options.get(ATTENTION), math.prod(self.grid)

        def attend(own: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs):
            run = own if there is None else functools.partial(there, own)
            heads = args[0] if args else kwargs["heads"]
            apart = kwargs.get("skip_reshape", False)  # B, H, N, D, else B, N, H*D or B, N, H, D
            tokens = query.shape[2 if apart else 1]
            if tokens > count:
                width = value.shape[-1] if value.ndim == 4 else value.shape[-1] // heads
                for name in names:
                    of_words = self.called[name].of_words
                    before = begin(tokens, count, of_words.shape[1])
                    told = pad(told_of(of_words, tokens, before, tokens - before - count).to(value), (0, width - 2))
                    told = torch.stack([told] * heads, dim=1 if apart else 2).reshape(value.shape)
                    made = run(query, key, told, *args, **kwargs)
                    made = made.transpose(1, 2) if made.ndim == 4 else made.unflatten(-1, (heads, width))
                    found = looked_by(made[:, before : before + count], self.grid)
                    self.seen.setdefault(name, []).append(found)
                if not on:
                    raise LookedEnough
            return run(query, key, value, *args, **kwargs)

        return {**options, ATTENTION: attend}

    def look(
        self, name: str, attention: nn.Module, hidden: torch.Tensor, text: torch.Tensor, latent: tuple[int, int]
    ) -> None:
        """Note where a cross-attention of ComfyUI looks at an adapter's words: hidden (B, N, C), text (B, M, C')."""
        query, key = attention.to_q(hidden), attention.to_k(text)
        of_words = self.called[name].of_words
        self.seen.setdefault(name, []).append(looks_of(query, key, attention.heads, of_words, latent))

    def shares(
        self,
        named: list[str],
        grid: tuple[int, int],
        like: torch.Tensor,
        masked: Mapping[str, torch.Tensor],
        around: tuple[int, int] = (0, 0),
    ) -> dict[str, torch.Tensor]:
        """Shares of each token of an attention, (B, N, 1), of those adapters that are placed, within their masks.

        `around` are the tokens of a stream before the picture's and behind.
        """
        nothing = like.new_zeros(1, math.prod(grid) + sum(around), 1)
        if self.at is None:
            return dict.fromkeys(named, nothing)
        if not self.at or len(self.called) < 2:
            return {}
        found = divided(self.at, grid)  # also of who is not in this one
        found = {name: beside_words(one, *around) for name, one in found.items()}
        return {name: found.get(name, nothing) * masked.get(name, 1) for name in named}


class Drawing:
    """P pictures of latents (h, w) that are drawn twice: what the base predicted, and where it looked at words.

    Full-sized chunks, of prompts and negative ones, share what was seen in any of them. One that is an area of the
    picture has places of its own, and with it the negative one that ComfyUI makes for it, under the same id.
    """

    def __init__(self, count: int, size: tuple[int, int], of_tokens: bool = False) -> None:
        self.count, self.size, self.of_tokens = count, size, of_tokens
        self._base: dict[Hashable, torch.Tensor] = {}  # (P, C, h, w) by chunk
        self._looked: dict[Hashable, dict[str, Looked]] = {}  # by area and adapter
        self._at: dict[Hashable, dict[str, torch.Tensor]] | None = None  # (P, 1, h, w), once the base has drawn
        self._turns: Counter = Counter()

    def place(self) -> None:
        """The base has drawn, and the adapters follow."""
        self._turns.clear()
        self._at = {
            area: {name: looked.at(self.count) for name, looked in by_name.items() if looked.rows}
            for area, by_name in self._looked.items()
        }

    def step(
        self,
        latents: torch.Tensor,
        options: Mapping,
        called: Mapping[str, Called],
        run: Callable[[dict], torch.Tensor],
    ) -> torch.Tensor:
        """What the model predicts, around the subjects as the base did; `run` takes the pass with these options.

        Raises ValueError where the sampling takes other steps than the base's, and for parts of a batch.
        """
        grid = options[PICTURE].grid if self.of_tokens else (0, 0)
        ids, size = options["uuids"], tuple(latents.shape[-2:])
        if len(latents) != len(ids) * self.count:
            raise ValueError(
                "Another node draws parts of a batch by themselves (context windows), so COMCAT cannot tell the "
                "pictures apart: leave that node out, or COMCAT keep background."
            )
        noise = float(options["sigmas"].max())
        chunks = [self._turn((noise, *one)) for one in zip(options["cond_or_uncond"], ids, strict=True)]
        areas = [size if size == self.size else (size, one) for one in ids]
        if self._at is None:
            step = Places(called, None, grid)
            made = run({**options, PLACES: step})
            self._base |= zip(chunks, made.split(self.count), strict=True)
            self._note(step, areas)
            return made
        base = [self._base.get(chunk) for chunk in chunks]
        if any(one is None or one.shape[-2:] != size for one in base):
            raise ValueError(
                "With the adapter this sampler takes other steps than without, so the background cannot be kept: take "
                "one whose steps are fixed, or leave COMCAT keep background out."
            )
        made = run({**options, PLACES: Places(called, self._rows(areas), grid)}).split(self.count)
        return torch.cat([spread(*pair, self._weights(area)) for *pair, area in zip(base, made, areas, strict=True)])

    def _turn(self, chunk: tuple) -> tuple:
        """A chunk and how often it was there before: some samplers and guiders ask for one again."""
        self._turns[chunk] += 1
        return (*chunk, self._turns[chunk])

    def _note(self, step: Places, areas: list[Hashable]) -> None:
        for name, seen in step.seen.items():
            called = step.called[name]
            each = [one.split(self.count) for one in (torch.stack(seen).mean(0), called.of_words, called.bare)]
            for area, looked, of_words, bare in zip(areas, *each, strict=True):
                own = self._looked.setdefault(area, {}).setdefault(name, Looked())
                own.note(looked, Called(of_words, bare))

    def _rows(self, areas: list[Hashable]) -> dict[str, torch.Tensor]:
        """r of all chunks of a pass, by adapter; zero where its words are in no text of the area."""
        known = [self._at.get(area, {}) for area in areas]
        like = {name: one for by_name in known for name, one in by_name.items()}
        return {n: torch.cat([own.get(n, torch.zeros_like(one)) for own in known]) for n, one in like.items()}

    def _weights(self, area: Hashable) -> torch.Tensor:
        """w of a chunk, (P, 1, h, w); one where no text of its area names a subject, as nothing tells of a place."""
        at = self._at.get(area)
        if not at:
            return torch.ones(self.count, 1, 1, 1)
        return sum(weights_of(own, self.of_tokens) for own in at.values()).clamp(max=1)


class Twice:
    """The wrapper around ComfyUI's sampling: twice, where `asks` says of a conditioning that there is a background."""

    def __init__(self, asks: Callable[[Mapping], bool], of_tokens: bool = False) -> None:
        self.asks, self.of_tokens = asks, of_tokens

    def __call__(self, executor: Callable, noise: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        guider = executor.class_obj
        if not any(self.asks(one) for conds in guider.conds.values() for one in conds or ()):
            return executor(noise, *args, **kwargs)
        device = guider.model_patcher.load_device
        given = {name: [dict(one) for one in conds or ()] for name, conds in guider.conds.items()}
        with _told(guider, Drawing(len(noise), tuple(noise.shape[-2:]), self.of_tokens)) as drawing:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                executor(noise, *args, **kwargs)
            drawing.place()
            guider.conds = given  # which the sampling has made its own of
            return executor(noise, *args, **kwargs)


@contextmanager
def _told(guider: object, drawing: Drawing) -> Iterator[Drawing]:
    """In this block the passes of a guider's sampling are told of a drawing; its options are of this sampling alone."""
    options = guider.model_options["transformer_options"]
    options[PLACES] = drawing
    try:
        yield drawing
    finally:
        del options[PLACES]

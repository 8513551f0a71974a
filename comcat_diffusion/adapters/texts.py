"""Prompts, known again by the text states that were made of them, and where in a prompt a word stands.

States are known by the direction of their last one, which has read the whole prompt: so also in another precision, or
with single words weighted up. One memory belongs to a tokenizer, and so to all pipelines and threads that share it.

Letters: B batch, M context tokens, E width of the text states.
"""

import sys
import threading
import unicodedata
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from comcat_diffusion.families.family import Reading, Segment
from comcat_diffusion.words import places

States = torch.Tensor | list[torch.Tensor]  # (B, M, E), or of each prompt (M, E), of the tokens that it has alone
_REMEMBERED = 1024  # prompts; the oldest are forgotten
_SAME = 1 - 3e-6  # cosine of two last states of one prompt: bfloat16 is off by 2^-9 at most, which leaves 1 - 2e-6


@dataclass(frozen=True)
class Said:
    """A prompt as a text encoder has read it."""

    text: str
    ends: torch.Tensor  # (M,) where in the text each token ends; 0 of tokens that are not in it
    parts: tuple[int, ...]  # how many of the M tokens each of the tokenizers has made that read the text
    ahead: int = 0  # how many stand in front of them to fill them up, and see all of the text

    def acts(self, words: Sequence[str]) -> torch.Tensor:
        """(M,) of bool: each tokenizer's tokens from the first of these words on. What was cut off calls nothing."""
        starts = [start for word in words for start, _ in places(word, self.text)]
        if not starts:
            return torch.zeros(len(self.ends), dtype=torch.bool)
        found = torch.cat([(ends > min(starts)).cumsum(0) > 0 for ends in self.ends.split(self.parts)])
        found[: self.ahead] = found.any()
        return found

    def filled(self, length: int) -> Self:
        """The same with so many tokens, those that are more in no text."""
        there = self.ends[:length]
        return replace(self, ends=pad(there, (0, length - len(there))), parts=(length,))

    def within(self, words: Sequence[str]) -> torch.Tensor:
        """(M,) of bool: the tokens of these words alone."""
        found = torch.zeros(len(self.ends), dtype=torch.bool)
        for start, end in (place for word in words for place in places(word, self.text)):
            found |= (self.ends > start) & (self.ends <= end)
        return found


@dataclass(frozen=True)
class Chunks:
    """A prompt that was read in several runs of a text encoder, as programs do with long ones and at a BREAK.

    A run knows nothing of the others, so in each an adapter acts from the first of its words on that stands there.
    """

    runs: tuple[Said, ...]

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(one.text for one in self.runs)

    def acts(self, words: Sequence[str]) -> torch.Tensor:
        """See `Said`."""
        return torch.cat([one.acts(words) for one in self.runs])

    def within(self, words: Sequence[str]) -> torch.Tensor:
        """See `Said`."""
        return torch.cat([one.within(words) for one in self.runs])


class Texts:
    """The prompts that a tokenizer's text encoders have read, and those beside it, where a family has more."""

    def __init__(self, reading: Reading) -> None:
        self.lock = threading.RLock()  # a tokenizer changes its padding at every call: one thread at a time
        self.reading = reading
        self._said: OrderedDict[bytes, Said] = OrderedDict()  # by the direction of the last state, (E,) of float32

    def remember(
        self, states: States, prompts: Sequence[str], written_out: bool = False, prepared: bool = False
    ) -> None:
        """Know the text states (B, M, E) of B prompts again, however a pipeline repeats and stacks them.

        Prompts are `written_out` where each learned word stands as the several words that diffusers makes of it, and
        `prepared` where they are what the family makes of them before they are read.
        """
        with self.lock:
            for key, own, prompt in zip(self._keys(states), states, prompts, strict=True):
                self._said[key] = self.read(prompt, len(own), written_out, prepared)
                self._said.move_to_end(key)
            while len(self._said) > _REMEMBERED:
                self._said.popitem(last=False)

    def known(self, states: States) -> list[Said | Chunks] | None:
        """The prompts of text states (B, M, E), or None if one of them is of no prompt that is known."""
        with self.lock:
            found = [self._known(own, key) for key, own in zip(self._keys(states), states, strict=True)]
        return None if any(said is None for said in found) else found

    def _known(self, states: torch.Tensor, key: bytes) -> Said | Chunks | None:
        """The prompt of text states (M, E), as a whole or run by run of the text encoder."""
        said, size = self._nearest(key, len(states)), self._run()
        if said is None and size < len(states) and len(states) % size == 0:
            runs = states.split(size)
            found = [self._known(run, own) for run, own in zip(runs, self._keys(runs), strict=True)]
            said = None if any(one is None for one in found) else Chunks(tuple(found))
        if said is None and not np.frombuffer(key, np.float32).any():  # SDXL's states of no text at all
            return Said("", torch.zeros(len(states), dtype=torch.long), (len(states),))
        return said

    def _run(self) -> int:
        """How many tokens the text encoder reads at once, where it alone makes the states; else more than there are."""
        tokenizer = self.reading.segments[0].tokenizer
        return tokenizer.model_max_length if tokenizer is not None and self.whole_of(tokenizer) else sys.maxsize

    def read(self, prompt: str, length: int, written_out: bool = False, prepared: bool = False) -> Said:
        """A prompt as the text encoder is given it, in `length` tokens; see `remember`."""
        parts = self._parts(length)
        with self.lock:
            first = next(tokenizer for tokenizer, _ in parts if tokenizer is not None)
            text = prompt if written_out else TextualInversionLoaderMixin().maybe_convert_prompt(prompt, first)
            text = text if prepared else self.reading.prepared(text)
            text = unicodedata.normalize("NFC", text)  # as tokenizers do before they count
            if self.reading.prefix and text.startswith(self.reading.prefix):
                return _behind(self.reading.prefix, first, text, length)
            gone = self.reading.dropped
            if self.reading.ends is not None:
                return self._told(text, length)
            ends = torch.cat([_ends(tokenizer, text, count + gone)[gone:] for tokenizer, count in parts])
            before, behind = self.reading.around
            own = text[len(before) : len(text) - len(behind)]
            return Said(own, (ends - len(before)).clamp(min=0), tuple(count for _, count in parts))

    def _told(self, text: str, length: int) -> Said:
        """A prompt whose tokens' ends its family knows."""
        ends = torch.tensor(self.reading.ends(text, length), dtype=torch.long)
        more = length - len(ends)
        ahead = more if self.reading.ahead else 0
        return Said(text, pad(ends, (ahead, more - ahead)), (length,), ahead)

    def whole_of(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether a tokenizer reads all, all of it is the prompt, and it says itself which words tokens are."""
        alone = [segment.tokenizer for segment in self.reading.segments] == [tokenizer]
        return alone and not (self.reading.prefix or any(self.reading.around) or self.reading.ends)

    def _parts(self, length: int) -> list[tuple[PreTrainedTokenizerBase | None, int]]:
        """The tokenizers and how many of `length` tokens each makes."""
        found, left = [], length
        for segment in self.reading.segments:
            count = left if segment.length is None else min(segment.length, left)
            found.append((segment.tokenizer, count))
            left -= count
        return found

    def _keys(self, states: States) -> list[bytes]:
        """The directions of the last states, one of each tokenizer's part, side by side."""
        if not len(states):
            return []
        picked = torch.stack([own[self._last(self._heard(own))] for own in states]).detach().float().flatten(1)
        picked = picked / picked.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return [one.tobytes() for one in picked.cpu().numpy()]

    def _heard(self, states: torch.Tensor) -> int:
        """How many of the states (M, E) of a prompt are of its own; where they are all zero, all."""
        there = states.any(dim=-1).nonzero() if self.reading.filled else ()
        return int(there[-1]) + 1 if len(there) else len(states)

    def _last(self, length: int) -> list[int]:
        """Of `length` states the last of each tokenizer that reads."""
        found, before = [], 0
        for tokenizer, count in self._parts(length):
            before += count
            if tokenizer is not None and count:
                found.append(before - 1)
        return found

    def _nearest(self, key: bytes, length: int) -> Said | None:
        if key not in self._said:
            key = self._likest(key)
            if key is None:
                return None
        said = self._said[key]
        if self.reading.filled:
            return said.filled(length)
        return said if len(said.ends) == length else None

    def _likest(self, key: bytes) -> bytes | None:
        """The direction that is this one, else its first part: an encoder's states may stand before another's."""
        asked = np.frombuffer(key, np.float32)
        for width in sorted({len(other) for other in self._said if len(other) <= len(key)}, reverse=True):
            others = [other for other in self._said if len(other) == width]
            first = asked[: width // asked.itemsize]
            cosines = np.frombuffer(b"".join(others), np.float32).reshape(len(others), -1) @ first
            if cosines.max() >= _SAME * np.linalg.norm(first) > 0:
                return others[int(cosines.argmax())]
        return None


_KNOWN: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Texts] = weakref.WeakKeyDictionary()


def texts_of(tokenizer: PreTrainedTokenizerBase, reading: Reading | None = None) -> Texts:
    """The memory of a tokenizer; `reading` is how the family of its pipeline reads, where that is known."""
    found = _KNOWN.get(tokenizer)
    if found is None:
        found = _KNOWN.setdefault(tokenizer, Texts(Reading((Segment(tokenizer),))))
    if reading is not None:
        found.reading = reading
    return found


def _ends(tokenizer: PreTrainedTokenizerBase | None, text: str, length: int) -> torch.Tensor:
    """(length,) where in a text each token ends; 0 of those that are not in it."""
    if tokenizer is None or not length:
        return torch.zeros(length, dtype=torch.long)
    how = {"max_length": length, "truncation": True, "return_offsets_mapping": True}
    ends = torch.tensor([end for _, end in tokenizer(text, **how).offset_mapping], dtype=torch.long)
    return pad(ends, (0, length - len(ends)))  # whichever side its own padding would be on


def _behind(prefix: str, tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Said:
    """A prompt behind an instruction, of which the first token's state is kept, and the last `length` - 1 of all."""
    ends = _ends(tokenizer, text, len(tokenizer.encode(prefix)) + length - 2)
    own = (ends - len(prefix)).clamp(min=0)
    return Said(text[len(prefix) :], torch.cat([own[:1], own[1 - length :]]), (length,))

"""What the commands say, in the language of the page: sentences are found again by what never differs in them.

`texts.toml` holds each as English with names for what differs, `The caption {a} is empty: ...`, beside what it is in
another language. What differs is told by the words around it, from left to right, so that no name of a file, however
it is made, takes longer than others.
"""

import functools
import re
from dataclasses import dataclass

from comcat_diffusion.ui import texts

_GAP = re.compile(r"\{(\w+)([!?+]?)\}")
_GROUPED = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
_NUMBER = re.compile(r"-?\d+\.\d+")
_NAME = re.compile(r".*\.\w{2,5}( \(\d+ x \d+\))?")  # of a file, as lists of them hold it
_OR = re.compile(r"(?<=') or (?=')")
_SWAPPED = str.maketrans(",.", ".,")
DEEPEST = 4  # sentences within sentences


@dataclass(frozen=True)
class Pattern:
    """A sentence: what stands around its gaps, their names and marks, and what to say.

    A gap with ! holds a text that is known, too, one with ? may do so, and one with + a list; others are left alone.
    """

    around: tuple[str, ...]
    gaps: tuple[tuple[str, str], ...]
    said: str

    @classmethod
    def of(cls, english: str, said: str) -> "Pattern":
        """From both texts as texts.toml has them."""
        pieces = _GAP.split(english)
        return cls(tuple(pieces[::3]), tuple(zip(pieces[1::3], pieces[2::3], strict=True)), said)

    def found(self, sentence: str) -> list[str] | None:
        """What stands in the gaps of a sentence, each at least a letter; None if it is another sentence."""
        first, last = self.around[0], self.around[-1]
        if not self.gaps:
            return [] if sentence == first else None
        end = len(sentence) - len(last)
        if not sentence.startswith(first) or not sentence.endswith(last) or end <= len(first):
            return None
        at, parts = len(first), []
        for piece in self.around[1:-1]:
            place = sentence.find(piece, at + 1, end)
            if place < 0:
                return None
            parts.append(sentence[at:place])
            at = place + len(piece)
        return None if at >= end else [*parts, sentence[at:end]]


def said(sentence: str, language: str) -> str:
    """A sentence in a language; in English where it has no other."""
    return _found(sentence, language, ("sentences",), 0) or sentence


def known(text: str, language: str) -> str | None:
    """A sentence, or a part of one, in a language; None where it is known in none but English."""
    return _found(text, language, ("parts", "sentences"), 0)


def _found(text: str, language: str, tables: tuple[str, ...], deep: int) -> str | None:
    """What a text is in a language, if it is known."""
    for pattern in _patterns(language, tables) if deep < DEEPEST else ():
        parts = pattern.found(text)
        told = None if parts is None else _told(pattern, parts, language, deep)
        if told is not None:
            return _GAP.sub(lambda gap, told=told: told[gap[1]], pattern.said)
    return None


def _told(pattern: Pattern, parts: list[str], language: str, deep: int) -> dict[str, str] | None:
    """What stands in the gaps in a language, by their names; None if one holds what it should and does not."""
    told = {}
    for (name, mark), part in zip(pattern.gaps, parts, strict=True):
        inner = _found(part, language, ("parts", "sentences"), deep + 1) if mark in ("!", "?") else None
        if mark == "!" and inner is None:
            return None
        told[name] = inner or (_list(part, language) if mark == "+" else _number(part, language))
    return told


def _list(text: str, language: str) -> str:
    """Names of files, or words between quotes, with the language's own and and or between them."""
    if language != "de":
        return text
    names, found, last = text.rpartition(" and ")
    if found and _NAME.fullmatch(names):
        count, more, _ = last.rpartition(" more")
        return f"{names} und {count} weitere" if more and count.isdecimal() else f"{names} und {last}"
    return _OR.sub(" oder ", text)


def _number(text: str, language: str) -> str:
    """A number with the language's own marks; any other text as it is."""
    if language == "de" and (_GROUPED.fullmatch(text) or _NUMBER.fullmatch(text)):
        return text.translate(_SWAPPED)
    return text


@functools.cache
def _patterns(language: str, tables: tuple[str, ...]) -> list[Pattern]:
    """All of a language, those that say most first: others may be the same sentences with less of them fixed."""
    known = [Pattern.of(*pair) for table in tables for pair in texts.table(language, table).items()]
    return sorted(known, key=lambda pattern: -sum(map(len, pattern.around)))

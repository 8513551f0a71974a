"""Names of files as people and other systems write them: shown so that they can be read, and told apart by meaning."""

import unicodedata
from collections.abc import Iterable
from pathlib import PurePath

_UNSHOWN = ("Cc", "Cs")  # Unicode's categories of control characters and of bytes that are no text


def shown(name: str | PurePath) -> str:
    """A name or path as text of one line: composed letters, and an escape for every byte that is not UTF-8."""
    text = unicodedata.normalize("NFC", str(name))
    return "".join(_escaped(c) if unicodedata.category(c) in _UNSHOWN else c for c in text)


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries the byte 0x80 to 0xFF of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def same(name: str) -> str:
    """What names that differ in Unicode form or in case alone have in common."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def stem(name: str) -> str:
    """A file's name without its ending."""
    return PurePath(name).stem


class Owners:
    """Names of pictures, so that what belongs to one of them finds it."""

    def __init__(self, names: Iterable[str]):
        self._by: tuple[dict[str, list[str]], ...] = ({}, {}, {}, {})  # the strictest rule first
        for name in names:
            keys = (name, stem(name), same(name), same(stem(name)))
            for known, key in zip(self._by, keys, strict=True):
                known.setdefault(key, []).append(name)

    def of(self, called: str) -> list[str]:
        """The pictures of this name, with or without their ending; several if it could be any of them."""
        for known, key in zip(self._by, (called, called, same(called), same(called)), strict=True):
            if key in known:
                return known[key]
        return []

    def only(self, called: str, what: str) -> str | None:
        """The one picture of this name, if there is any. Raises ValueError, naming `what`, if there are several."""
        found = self.of(called)
        if len(found) > 1:
            told = " and ".join(map(shown, found[:2]))
            raise ValueError(f"{what} could belong to {told}: give every picture a name of its own.")
        return found[0] if found else None

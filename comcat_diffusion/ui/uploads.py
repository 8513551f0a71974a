"""What a browser sends: as many bytes as a thing of its kind may have, under a name that is one here too."""

import unicodedata
from pathlib import PurePosixPath

from starlette.requests import Request

MOST_BYTES = {"picture": 100_000_000, "mask": 20_000_000, "caption": 20_000, "adapter": 500_000_000, "json": 200_000}
LONGEST = 80  # letters of a name that is kept
_KEPT = "-_. ()"


class TooLarge(ValueError):
    """More was sent than a thing of its kind may have."""


async def body(request: Request, kind: str) -> bytes:
    """What a request brings. Raises TooLarge as soon as it is too much, ValueError for nothing."""
    most, parts, size = MOST_BYTES[kind], [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise TooLarge(f"This is more than the {most / 1e6:,.2g} MB that a {kind} may have.")
        parts.append(part)
    if not size:
        raise ValueError("The file is empty.")
    return b"".join(parts)


def clean_name(name: str) -> tuple[str, str]:
    """(stem, ending) of a file's name as another system wrote it, safe to write here: letters, digits, dashes, spaces.

    Its folders are left out, and what is no letter becomes a dash.
    """
    last = PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/")).name
    stem, dot, ending = last.rpartition(".")
    stem, ending = (stem, ending) if dot and stem else (last, "")
    kept = "".join(letter if letter.isalnum() or letter in _KEPT else "-" for letter in stem)
    kept = " ".join(kept.split()).strip(" .-")[:LONGEST].strip(" .-")
    suffix = f".{ending.lower()}" if ending.isascii() and ending.isalnum() and len(ending) <= 11 else ""
    return kept or "picture", suffix


def unique(stem: str, taken: set[str]) -> str:
    """The name, or the first of name 2, name 3, ... that is not taken, in small or capital letters."""
    lower, number, found = {name.casefold() for name in taken}, 1, stem
    while found.casefold() in lower:
        number += 1
        found = f"{stem} {number}"
    return found

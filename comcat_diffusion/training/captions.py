"""The captions of a folder of pictures: a text file beside each, or a line of `metadata.jsonl` for each."""

import json
from collections.abc import Iterable
from pathlib import Path

from comcat_diffusion.training.names import Owners, shown, stem

SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"


def captions(folder: Path, pictures: Iterable[str], sidecars: list[Path]) -> dict[str, str]:
    """Captions by the name of a picture; all pictures have one, or none has.

    Raises ValueError, naming the file, for one that cannot be read, belongs to no picture or to several, or is a
    picture's second.
    """
    owners, pictures = Owners(pictures), list(pictures)
    if (folder / METADATA).is_file():
        if sidecars:
            other = shown(sidecars[0].name)
            raise ValueError(f"{shown(folder)} has captions in {METADATA} and in {other}: keep one of the two.")
        found = _metadata(folder / METADATA, owners)
    else:
        found = _beside(sidecars, owners)
    without = [name for name in pictures if name not in found]
    if found and without:
        raise ValueError(
            f"{shown(folder / without[0])} has no caption, but other pictures of the folder have: write it, or remove "
            "all."
        )
    return found


def _beside(sidecars: list[Path], owners: Owners) -> dict[str, str]:
    places: dict[str, Path] = {}
    for path in sidecars:
        owner = owners.only(stem(path.name), f"The caption {shown(path)}")
        if owner is None:
            raise ValueError(f"The caption {shown(path)} has no picture of the same name: rename it or take it out.")
        if owner in places:
            both = f"{shown(places[owner].name)} and {shown(path.name)}"
            raise ValueError(f"{shown(path.parent / owner)} has two captions, {both}: keep one of them.")
        places[owner] = path
    return {owner: _text(path) for owner, path in places.items()}


def _text(path: Path) -> str:
    try:
        text = " ".join(path.read_text("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"The caption {shown(path)} is not UTF-8 text; save it as UTF-8.") from error
    if not text:
        raise ValueError(f"The caption {shown(path)} is empty: describe the picture, or remove all captions.")
    return text


def _metadata(path: Path, owners: Owners) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            where = f"{shown(path)}, line {number}"
            name, text = _row(line, where)
            owner = owners.only(name, f"{where}: {shown(name)}")
            if owner is None:
                raise ValueError(f"{where}: there is no picture '{shown(name)}' in the folder.")
            if owner in found:
                raise ValueError(f"{where}: {shown(name)} has a line already: keep one of the two.")
            found[owner] = text
    return found


def _row(line: bytes, where: str) -> tuple[str, str]:
    """(file_name, text) of one line of metadata."""
    wanted = '{"file_name": "1.png", "text": "what it shows"}'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not {wanted} in JSON ({error}).") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not {wanted} but a {type(row).__name__}: write one such object a line.")
    for key in ("file_name", "text"):
        if not isinstance(row.get(key), str):
            told = json.dumps(row[key]) if key in row else "missing"
            raise ValueError(f"{where} is not {wanted}: its {key} must be text, and is {told[:40]}.")
    name, text = row["file_name"], " ".join(row["text"].split())
    if not text:
        raise ValueError(f"{where}: the text of {shown(name)} is empty.")
    if text != text.encode("utf-8", "ignore").decode():
        raise ValueError(f"{where}: the text of {shown(name)} has half a letter (a lone surrogate): write it anew.")
    return name, text

"""What the files of a picture folder are: pictures, the captions and masks that belong to them, and strays.

A caption is a `.txt` or `.caption` file of the picture's name, or a line of `metadata.jsonl` (`file_name`, `text`), as
other trainers have it. A mask is a file named `PICTURE-mask.png`: white is the subject, black is not learned.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
CAPTIONS = (".txt", ".caption")
METADATA = "metadata.jsonl"
MASK = "-mask"


@dataclass(frozen=True)
class Shot:
    """One picture, what it shows in words (None: nobody said), and where its mask is."""

    path: Path
    caption: str | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder in order of name, and what was left aside, with the reason."""

    shots: tuple[Shot, ...]
    ignored: dict[str, str] = field(default_factory=dict)


def find(folder: str | Path) -> Folder:
    """Sort the files of a folder.

    Raises FileNotFoundError or ValueError if there is no folder or no picture, if a caption or mask has no picture, or
    if only some pictures have captions.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder that holds the pictures.")
    pictures, masks, sidecars, ignored = {}, {}, {}, {}
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        reason = _reason_to_ignore(path)
        if reason is not None:
            ignored[path.name] = reason
        elif path.suffix.lower() in CAPTIONS:
            sidecars[path.stem] = path
        elif path.name != METADATA:
            (masks if path.stem.endswith(MASK) else pictures)[path.name] = path
    if not pictures:
        listed = [*ignored, *(path.name for path in sidecars.values())][:3]
        found = f"; it holds {', '.join(listed)}" if listed else "; it is empty"
        raise ValueError(f"There are no pictures ({', '.join(SUFFIXES)}) in {folder}{found}.")
    captions = _captions(folder, pictures, sidecars)
    masked = _masks(pictures, masks)
    shots = tuple(Shot(path, captions.get(name), masked.get(name)) for name, path in pictures.items())
    return Folder(shots, ignored)


def _reason_to_ignore(path: Path) -> str | None:
    if path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini"):
        return "a system file"
    if path.is_dir():
        return "a folder"
    if path.suffix.lower() not in SUFFIXES + CAPTIONS and path.name != METADATA:
        return "not a picture"
    return None


def _captions(folder: Path, pictures: dict[str, Path], sidecars: dict[str, Path]) -> dict[str, str]:
    """Captions by picture name; all pictures have one, or none has."""
    if (folder / METADATA).is_file():
        if sidecars:
            other = next(iter(sidecars.values())).name
            raise ValueError(f"{folder} has captions in {METADATA} and in {other}: keep one of the two.")
        captions = _metadata(folder / METADATA, pictures)
    else:
        stems = {path.stem: name for name, path in pictures.items()}
        for stem, path in sidecars.items():
            if stem not in stems:
                raise ValueError(f"The caption {path} has no picture of the same name: rename it or take it out.")
        captions = {stems[stem]: _text(path) for stem, path in sidecars.items()}
    without = [name for name in pictures if name not in captions]
    if captions and without:
        raise ValueError(
            f"{folder / without[0]} has no caption, but other pictures of the folder have: write it, or remove all."
        )
    return captions


def _text(path: Path) -> str:
    try:
        text = " ".join(path.read_text("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"The caption {path} is not UTF-8 text; save it as UTF-8.") from error
    if not text:
        raise ValueError(f"The caption {path} is empty: describe the picture, or remove all captions.")
    return text


def _metadata(path: Path, pictures: dict[str, Path]) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number} is not {{"file_name": ..., "text": ...}} in JSON ({error}).'
            ) from error
        if name not in pictures:
            raise ValueError(f"{path}, line {number}: there is no picture {name!r} in the folder.")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}, line {number}: the text of {name} is empty.")
        captions[name] = " ".join(text.split())
    return captions


def _masks(pictures: dict[str, Path], masks: dict[str, Path]) -> dict[str, Path]:
    """Masks by picture name."""
    stems = {path.stem: name for name, path in pictures.items()}
    for path in masks.values():
        if path.stem.removesuffix(MASK) not in stems:
            raise ValueError(
                f"The mask {path} has no picture {path.stem.removesuffix(MASK)}: rename it or take it out."
            )
    return {stems[path.stem.removesuffix(MASK)]: path for path in masks.values()}

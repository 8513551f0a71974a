"""What the files of a picture folder are: pictures, the captions and masks that belong to them, and strays.

A caption is a `.txt` or `.caption` file of the picture's name, or a line of `metadata.jsonl` (`file_name`, `text`), as
other trainers have it. A mask is named after its picture (see masks.py): white is the subject, black is not learned.
"""

from dataclasses import dataclass, field
from pathlib import Path

from comcat_diffusion.training import captions, masks
from comcat_diffusion.training.names import shown

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".hif",
)  # fmt: skip
# What people have as pictures and Pillow does not read.
UNREAD = (
    ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".psd", ".xcf", ".svg", ".jxl", ".pdf",
)  # fmt: skip

OTHER_FORMAT = "of a format that is not read: save it as PNG or JPEG"
OTHER_FOLDER = "a folder with pictures, which are not read: only those beside it are"
DOUBTFUL = (OTHER_FORMAT, OTHER_FOLDER)  # reasons to leave something aside that may be meant to be learned from


@dataclass(frozen=True)
class Shot:
    """One picture, what it shows in words (None: nobody said), and where its mask is."""

    path: Path
    caption: str | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder in order of name, what was left aside, with the reason, and what else is doubtful."""

    shots: tuple[Shot, ...]
    ignored: dict[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


def find(folder: str | Path) -> Folder:
    """Sort the files of a folder.

    Raises FileNotFoundError or ValueError if there is no folder or no picture, if a caption or mask belongs to no
    picture or to several, or if only some pictures have captions.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {shown(folder)}.")
    if not folder.is_dir():
        raise ValueError(f"{shown(folder)} is a file; give the folder that holds the pictures.")
    images, beside, sidecars, ignored = {}, [], [], {}
    for path in sorted(folder.iterdir(), key=lambda p: shown(p.name)):
        reason = _reason_to_ignore(path)
        if path.is_dir() and path.name.lower() in masks.FOLDERS:
            beside += _images(path)
        elif reason is not None:
            ignored[shown(path.name)] = reason
        elif path.suffix.lower() in captions.SUFFIXES:
            sidecars.append(path)
        elif path.name != captions.METADATA:
            images[path.name] = path
    if not images:
        listed = [*ignored, *(shown(path.name) for path in sidecars)][:3]
        found = f"; it holds {', '.join(listed)}" if listed else "; it is empty"
        raise ValueError(f"There are no pictures ({', '.join(SUFFIXES)}) in {shown(folder)}{found}.")
    pictures, masked, doubts = masks.told_apart(images, beside)
    said = captions.captions(folder, pictures, sidecars)
    shots = tuple(Shot(path, said.get(name), masked.get(name)) for name, path in pictures.items())
    return Folder(shots, ignored, tuple(doubts))


def _reason_to_ignore(path: Path) -> str | None:
    if path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini"):
        return "a system file"
    if path.is_dir():
        return OTHER_FOLDER if _images(path) else "a folder"
    if path.suffix.lower() in UNREAD:
        return OTHER_FORMAT
    if path.suffix.lower() not in SUFFIXES + captions.SUFFIXES and path.name != captions.METADATA:
        return "not a picture"
    return None


def _images(folder: Path) -> list[Path]:
    """The image files of a folder in order of name; none if it may not be looked into."""
    try:
        inside = sorted(folder.iterdir(), key=lambda p: shown(p.name))
    except OSError:
        return []
    return [p for p in inside if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]

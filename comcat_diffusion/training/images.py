"""The pictures of a subject: found, checked, turned upright, made square."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SMALL = 0.5  # below this share of the training resolution a picture is called tiny
MOST_PIXELS = 150_000_000  # above this a picture is more likely a mistake or an attack than a photo


@dataclass(frozen=True)
class Folder:
    """What a picture folder holds: the pictures in order of name, and what was left aside, with the reason."""

    pictures: tuple[Path, ...]
    ignored: dict[str, str] = field(default_factory=dict)


def find(folder: str | Path) -> Folder:
    """List the pictures of a folder. Raises FileNotFoundError or ValueError if there is no folder or no picture."""
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder that holds the pictures.")
    pictures, ignored = [], {}
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        reason = _reason_to_ignore(path)
        if reason is None:
            pictures.append(path)
        else:
            ignored[path.name] = reason
    if not pictures:
        found = f"; it holds {', '.join(list(ignored)[:3])}" if ignored else "; it is empty"
        raise ValueError(f"There are no pictures ({', '.join(SUFFIXES)}) in {folder}{found}.")
    return Folder(tuple(pictures), ignored)


def _reason_to_ignore(path: Path) -> str | None:
    if path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini"):
        return "a system file"
    if path.is_dir():
        return "a folder"
    if path.suffix.lower() not in SUFFIXES:
        return "not a picture"
    return None


def read(path: Path) -> tuple[Image.Image, list[str]]:
    """One picture as upright RGB, and what had to be done to it.

    Transparent pixels become white. Raises ValueError, naming the file, if it cannot be read.
    """
    notes = []
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{path} has {opened.width} x {opened.height} pixels; make it smaller.")
            if getattr(opened, "n_frames", 1) > 1:
                notes.append("animated: only its first frame is used")
            if opened.getexif().get(0x0112, 1) != 1:
                notes.append("turned upright as its EXIF data say")
            picture = ImageOps.exif_transpose(opened)
            if picture.has_transparency_data:
                notes.append("transparent pixels became white")
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            elif picture.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them
                picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
            elif picture.mode != "RGB":
                notes.append(f"converted from {picture.mode} to RGB")
            return picture.convert("RGB"), notes
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be read as a picture ({error}); mend it or take it out of the folder."
        ) from error


def squares(
    picture: Image.Image, side: int, center_crop: bool, mirrored: bool, rng: random.Random
) -> list[Image.Image]:
    """The square cut-outs that are learned from: the middle one or four random ones, and their mirror images."""
    scale = side / min(picture.size)
    size = tuple(max(side, round(edge * scale)) for edge in picture.size)
    resized = picture.resize(size, Image.LANCZOS)
    spare = (size[0] - side, size[1] - side)
    corners = [(spare[0] // 2, spare[1] // 2)]
    if not center_crop and any(spare):
        corners = [(rng.randint(0, spare[0]), rng.randint(0, spare[1])) for _ in range(4)]
    cuts = [resized.crop((left, top, left + side, top + side)) for left, top in corners]
    return cuts + [ImageOps.mirror(cut) for cut in cuts] if mirrored else cuts


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures of one size -> float32 (B, 3, H, W) in [-1, 1]."""
    stacked = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).div(127.5).sub(1)

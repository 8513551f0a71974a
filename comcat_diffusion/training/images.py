"""One picture of a subject and its mask: read, checked, turned upright."""

import hashlib
import typing
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if typing.TYPE_CHECKING:
    import torch

MOST_PIXELS = 150_000_000  # above this a picture is more likely a mistake or an attack than a photo


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


def read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """A mask as greyscale. Raises ValueError if it cannot be read or is not of its picture's size."""
    mask = read(path)[0].convert("L")
    if mask.size != size:
        raise ValueError(
            f"The mask {path} is {mask.width} x {mask.height} and its picture {size[0]} x {size[1]}: make them equal."
        )
    return mask


def read_alpha(path: Path) -> Image.Image | None:
    """The alpha channel of a picture, upright, or None if it has none."""
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        return picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None


def content_of(picture: Image.Image) -> str:
    """A hash of what a picture shows, whatever file it came from."""
    return hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).hexdigest()


def to_tensor(pictures: list[Image.Image]) -> "torch.Tensor":
    """Pictures of one size -> float32 (B, 3, H, W) in [-1, 1]."""
    import torch  # which nothing else here waits for: pictures are looked at before anything big is loaded

    stacked = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).div(127.5).sub(1)

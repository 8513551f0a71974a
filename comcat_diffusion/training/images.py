"""One picture of a subject and its mask: read, checked, turned upright."""

import hashlib
import typing
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from comcat_diffusion.training.colours import GREYS, eight_bits, srgb
from comcat_diffusion.training.names import shown

if typing.TYPE_CHECKING:
    import torch

if typing.TYPE_CHECKING:
    import torch

MOST_PIXELS = 150_000_000  # above this a picture is more likely a mistake or an attack than a photo
_HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")
_OPAQUE = 128  # of 255: alpha from which on a pixel is seen
_BLACK, _WHITE = 16, 239  # of 255, with what a brush or a resize adds


class PictureError(ValueError):
    """A file that is no picture of use. The message is one sentence, names the file and says what to do."""


def read(path: Path) -> tuple[Image.Image, list[str]]:
    """One picture as upright sRGB, and what had to be done to it.

    Transparent pixels become white. Raises PictureError if it cannot be read.
    """
    picture, profile, notes = _upright(path)
    alpha = None
    if picture.has_transparency_data:
        notes.append("transparent pixels became white")
        layer = picture.convert("RGBA")
        alpha, picture = layer.getchannel("A"), layer.convert("L" if picture.mode in GREYS else "RGB")
    picture, more = srgb(picture, profile)
    if alpha is not None:
        picture.putalpha(alpha)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture, notes + more


def read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """A mask as `read_layer` reads it. Raises PictureError if it cannot be read or is not of its picture's size."""
    mask = read_layer(path)
    if mask.size != size:
        raise PictureError(
            f"The mask {shown(path)} is {mask.width} x {mask.height} and its picture {size[0]} x {size[1]}: make them "
            "equal."
        )
    return mask


def read_layer(path: Path) -> Image.Image:
    """A mask as greyscale, black wherever it is transparent.

    What is painted in black and white on a transparent layer is read as painted; anything else with a transparent
    outside is a cut-out, and its outline the mask. Raises PictureError if it cannot be read.
    """
    mask, _, _ = _upright(path)
    if not mask.has_transparency_data:
        return mask.convert("L")
    layer = mask.convert("RGBA")
    alpha = layer.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return layer.convert("L")
    seen = np.asarray(layer.convert("RGB"))[np.asarray(alpha) >= _OPAQUE]  # pixels, 3
    painted = ((seen <= _BLACK).all(1) | (seen >= _WHITE).all(1)).mean() > 0.9 if len(seen) else True
    return Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("L") if painted else alpha


def read_alpha(path: Path) -> Image.Image | None:
    """The alpha channel of a picture, upright, or None if it has none. Raises PictureError if it cannot be read."""
    picture, _, _ = _upright(path)
    return picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None


def content_of(picture: Image.Image) -> str:
    """A hash of what a picture shows, whatever file it came from."""
    return hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).hexdigest()


def to_tensor(pictures: list[Image.Image]) -> "torch.Tensor":
    """Pictures of one size -> float32 (B, 3, H, W) in [-1, 1]."""
    import torch  # which nothing else here waits for: pictures are looked at before anything big is loaded

    stacked = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).div(127.5).sub(1)


def _upright(path: Path) -> tuple[Image.Image, bytes | None, list[str]]:
    """A file's first picture, upright and of 8 bits, its ICC profile, and what was done to it. Raises PictureError."""
    notes = []
    try:
        with _opened(path) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise PictureError(f"{shown(path)} has {opened.width} x {opened.height} pixels; make it smaller.")
            frames = getattr(opened, "n_frames", 1)
            if frames > 1:
                notes.append(f"of its {frames} frames or pages the first is used")
            if opened.getexif().get(0x0112, 1) in range(2, 9):
                notes.append("turned upright as its EXIF data say")
            profile = opened.info.get("icc_profile")
            picture, more = eight_bits(ImageOps.exif_transpose(opened))
            return picture, profile, notes + more
    except PictureError:
        raise
    except Exception as error:  # every decoder has its own of a damaged file
        raise PictureError(f"{shown(path)} cannot be read as a picture ({error}); mend it or take it away.") from error


def _opened(path: Path) -> Image.Image:
    """A file opened by Pillow, or by the package that reads a phone's pictures, if it is one."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        with path.open("rb") as file:
            start = file.read(64)
        if start[4:8] != b"ftyp":
            raise
        kind = "AVIF" if b"avif" in start or b"avis" in start else "HEIC" if start[8:12] in _HEIF else None
        if kind == "HEIC":
            _read_heic_too(path)
            return Image.open(path)
        if kind == "AVIF" and not features.check("avif"):
            raise PictureError(
                f"{shown(path)} is an AVIF picture, which Pillow reads from version 11.3 on: pip install -U pillow, or "
                "save it as JPEG."
            ) from None
        raise


def _read_heic_too(path: Path) -> None:
    """Teach Pillow to open HEIC. Raises PictureError, naming the package, if that is not installed."""
    try:
        import pillow_heif
    except ImportError as error:
        raise PictureError(
            f"{shown(path)} is a HEIC picture, which takes a package of its own to read: pip install pillow-heif, or "
            "save it as JPEG."
        ) from error
    pillow_heif.register_heif_opener()

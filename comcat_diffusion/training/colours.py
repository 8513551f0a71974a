"""What the numbers of a picture file mean: deep and floating values, colour spaces and profiles, brought to sRGB."""

import io

import numpy as np
from PIL import Image, ImageChops, ImageCms

GREYS = ("1", "L", "LA")
UNSEEN = 2  # levels of 255; a profile that changes no more is sRGB by another name


def eight_bits(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    """A grey picture of 16 or 32 bits, whole or floating numbers, in 8 bits; others as they are. And what was done.

    Pillow would clip them. 16 bits fill their range; of 32 bits nobody knows which range is meant, so it is the
    smallest usual one that holds all values, or else what lies between the least and the largest value. Raises
    ValueError for values that are no numbers.
    """
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) / 257).astype(np.uint8)), ["16-bit values brought to 8 bits"]
    if picture.mode not in ("I", "F"):
        return picture, []
    values = np.asarray(picture, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some of its values are no numbers")
    low, high = _range(float(values.min()), float(values.max()), picture.mode == "F")
    scaled = np.clip((values - low) / (high - low), 0, 1) * 255
    return Image.fromarray(scaled.round().astype(np.uint8)), [f"32-bit values, {low:g} to {high:g}, brought to 8 bits"]


def _range(least: float, largest: float, floating: bool) -> tuple[float, float]:
    """The values that are meant to be black and white; a little overshoot, as resizing leaves it, is clipped."""
    if least < -0.05 * max(largest, 0.0):
        return least, max(largest, least + 1)
    usual = (1.0, 255.0, 65535.0) if floating else (255.0, 65535.0)
    white = next((white for white in usual if largest <= white * 1.05), largest)
    glaring = floating and white == 255 and largest < 16  # 1.4 in floats is a bright spot, not nearly black of 255
    return 0.0, largest if glaring else white


def srgb(picture: Image.Image, profile: bytes | None) -> tuple[Image.Image, list[str]]:
    """A picture without transparency as sRGB, by its ICC profile where it has one, and what was done to it.

    A profile that is broken, or of another kind of picture, is left aside and told.
    """
    plain, notes = _plain(picture)
    if not profile:
        return plain, notes
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = " ".join(ImageCms.getProfileDescription(own).split()) or "its profile"
        meant = _as_meant(picture, plain, own.profile.xcolor_space.strip())
        converted = ImageCms.profileToProfile(meant, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return plain, [*notes, "its colour profile is broken or not of such a picture and was left aside"]
    if max(high for _, high in ImageChops.difference(plain, converted).getextrema()) <= UNSEEN:
        return plain, notes
    return converted, [*notes, f"colours converted from '{name}' to sRGB"]


def _plain(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    """A picture as RGB, whatever its profile says."""
    if picture.mode == "RGB":
        return picture, []
    notes = [f"converted from {picture.mode} to RGB"]
    if picture.mode == "LAB":  # which Pillow has learned to convert late
        spaces = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, *spaces, outputMode="RGB"), notes
    return picture.convert("RGB"), notes


def _as_meant(picture: Image.Image, plain: Image.Image, space: str) -> Image.Image:
    """The picture in the numbers that a profile of a space is about. Raises ValueError if they do not go together."""
    if space == "RGB" and picture.mode not in ("CMYK", "LAB"):
        return plain
    if space == "GRAY" and picture.mode in GREYS:
        return picture.convert("L")
    if space == "CMYK" and picture.mode == "CMYK":
        return picture
    raise ValueError(f"a profile of {space} for {picture.mode}")

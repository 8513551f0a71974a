"""Cut-outs of pictures in the sizes that are trained on: one square, or buckets of many shapes and one area.

Sizes are (height, width) in pixels.
"""

import random
from dataclasses import dataclass

from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets
from PIL import Image, ImageOps

RANDOM_CROPS = 4  # places that a picture is cut at when it is not its middle


@dataclass(frozen=True)
class Cut:
    """A cut-out, its mask, and what SDXL wants to know of it."""

    image: Image.Image
    mask: Image.Image | None
    original: tuple[int, int]  # of the whole picture
    corner: tuple[int, int]  # top and left of the cut-out in the resized picture

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.height, self.image.width


def sizes(resolution: int, buckets: bool, multiple: int) -> list[tuple[int, int]]:
    """The sizes that pictures may be cut to; `multiple` is what the base's sides must be divisible by."""
    if not buckets:
        return [(resolution, resolution)]
    return generate_aspect_ratio_buckets(resolution, divisibility=multiple)


def fitted(size: tuple[int, int], options: list[tuple[int, int]]) -> tuple[tuple[int, int], float]:
    """(the option nearest in shape to a picture of this width and height, the scale at which the picture fills it)."""
    width, height = size
    option = options[find_nearest_bucket(height, width, options)]
    return option, max(option[0] / height, option[1] / width)


def cuts(
    picture: Image.Image,
    mask: Image.Image | None,
    options: list[tuple[int, int]],
    center_crop: bool,
    mirrored: bool,
    rng: random.Random,
) -> list[Cut]:
    """The picture at the nearest size: its middle, or random places where there is room, and their mirror images."""
    (height, width), scale = fitted(picture.size, options)
    resized = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    spare = (resized[0] - width, resized[1] - height)
    corners = [(spare[0] // 2, spare[1] // 2)]
    if not center_crop and any(spare):
        corners = [(rng.randint(0, spare[0]), rng.randint(0, spare[1])) for _ in range(RANDOM_CROPS)]
    large = picture.resize(resized, Image.LANCZOS)
    large_mask = mask.resize(resized, Image.BILINEAR) if mask else None
    found = []
    for left, top in corners:
        box = (left, top, left + width, top + height)
        part = large_mask.crop(box) if large_mask else None
        whole = (picture.height, picture.width)
        found.append(Cut(large.crop(box), part, whole, (top, left)))
        if mirrored:
            flipped = ImageOps.mirror(part) if part else None
            found.append(Cut(ImageOps.mirror(large.crop(box)), flipped, whole, (top, left)))
    return found

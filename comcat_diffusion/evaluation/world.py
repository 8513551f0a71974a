"""What a picture of the embedded base's world shows, read from its pixels, and what a prompt asks for in words.

The base draws one thing of a named size, at a named place, on a background of a named colour; all three can be seen
without any model.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn.functional import normalize

from comcat_diffusion import bases
from comcat_diffusion.evaluation.cutout import centred
from comcat_diffusion.training.backgrounds import reached

OFF_BORDER = 40  # of 255: a pixel that differs more from the border's colour in any channel belongs to the thing
LEAST = 20  # pixels; fewer are stray ones
NOTHING, NOWHERE = "nothing", "nowhere"
SIDE, SPAN = 64, 48  # pixels: side of the picture of a thing alone, and the thing's own longest side on it
FINE, COARSE = 1, 8  # pixels: blurs between which details lie


@dataclass(frozen=True)
class World:
    """The names of the world and what they mean."""

    backgrounds: Mapping[str, tuple[int, int, int]]  # colours
    places: Mapping[str, str]  # in words: "on the left"
    sizes: Mapping[str, int]  # longest side in pixels


@dataclass(frozen=True)
class Seen:
    """What a picture shows, or a prompt asks for: the colour of the border, where and how big the thing inside is.

    None: the prompt leaves it open.
    """

    background: str | None
    place: str | None
    size: str | None


@functools.cache
def embedded_world() -> World:
    """The world of the embedded base, from the file beside its weights."""
    told = json.loads((bases.assets() / "tiny-sd" / "world.json").read_text("utf-8"))
    colours = {name: tuple(colour) for name, colour in told["backgrounds"].items()}
    return World(colours, told["places"], told["sizes"])


def see(picture: np.ndarray, world: World | None = None) -> Seen:
    """Read background, place and size from a uint8 (H, W, 3) picture of the world."""
    world = world or embedded_world()
    border = _border(picture)
    background = min(world.backgrounds, key=lambda name: np.abs(border - np.array(world.backgrounds[name])).sum())
    down, across = np.nonzero(_off(picture, border))
    if len(down) < LEAST:
        return Seen(background, NOWHERE, NOTHING)
    # a few stray pixels must not move the box
    left, right = np.percentile(across, (2, 98))
    top, bottom = np.percentile(down, (2, 98))
    height, width = picture.shape[:2]
    off_x, off_y = (left + right + 1 - width) / 2, (top + bottom + 1 - height) / 2
    place = "middle"
    if max(abs(off_x), abs(off_y)) > 4.5:
        place = ("left" if off_x < 0 else "right") if abs(off_x) > abs(off_y) else ("top" if off_y < 0 else "bottom")
    side = max(right - left, bottom - top) + 1
    return Seen(background, place, "small" if side < sum(world.sizes.values()) / 2 else "big")


def asked(prompt: str, world: World | None = None) -> Seen:
    """What a prompt asks for: "a big dog on the left, red background"."""
    world = world or embedded_world()
    said = f" {' '.join(prompt.lower().replace(',', ' ').split())} "
    background = next((name for name in world.backgrounds if f" {name} background " in said), None)
    place = next((name for name, words in world.places.items() if f" {words} " in said), None)
    return Seen(background, place, next((name for name in world.sizes if f" {name} " in said), None))


def alone(picture: Image.Image) -> Image.Image:
    """The thing of a picture, cut out and centred on neutral grey at one size: the subject without where it stands.

    Where there is no thing, all is grey.
    """
    if max(picture.size) > SIDE:  # a photo and a drawing are then equally sharp
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    return centred(picture, outline(picture), SIDE, SPAN)


def outline(picture: Image.Image) -> Image.Image:
    """Where the thing of a picture is: a grey picture of its size, white there and black elsewhere."""
    pixels = np.asarray(picture.convert("RGB"))
    return _filled(_off(pixels, _border(pixels)))


def details(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """What the things of pictures look like but for their mean colours: (N, F), float32 rows of length one.

    Each is `alone`, less a wide blur of itself. The cosine of two rows is then a correlation of shapes and marks, where
    a CLIP as small as the embedded one is satisfied by the colour.
    """
    rows = []
    for picture in pictures:
        thing = alone(picture)
        fine, coarse = (
            np.asarray(thing.filter(ImageFilter.GaussianBlur(width)), np.float32) for width in (FINE, COARSE)
        )
        rows.append(torch.from_numpy(fine - coarse).flatten())
    return normalize(torch.stack(rows), dim=-1)


def _border(picture: np.ndarray) -> np.ndarray:
    """The median colour of the two outermost rows and columns: (3,)."""
    pixels = picture.astype(np.float32)
    edges = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def _off(picture: np.ndarray, border: np.ndarray) -> np.ndarray:
    """Which pixels are not of the border's colour: bool (H, W)."""
    return np.abs(picture.astype(np.float32) - border).max(-1) > OFF_BORDER


def _filled(thing: np.ndarray) -> Image.Image:
    """The thing without stray pixels and with what it encloses, as a mask: what the background does not flow into."""
    without_strays = Image.fromarray(thing.astype(np.uint8) * 255).filter(ImageFilter.MedianFilter(3))
    if without_strays.histogram()[255] < LEAST:
        return Image.new("L", without_strays.size)
    return Image.fromarray(~reached(np.asarray(without_strays) == 0)).convert("L")

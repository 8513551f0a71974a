"""Draw scenes: colour glyphs of Debian's `fonts-noto-color-emoji`, scaled, tinted and placed on a plain background."""

import functools
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipe.world import BACKGROUNDS, OBJECTS, PAIR_SIZE, PIXELS, SIZES, TINTS, Scene, random_scene

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the one size in pixels at which this bitmap font holds its glyphs


@functools.cache
def glyph(name: str) -> Image.Image:
    """The object's glyph in its own colours, RGBA, cropped to what is drawn."""
    font = ImageFont.truetype(str(FONT), STRIKE)
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((10, 10), OBJECTS[name], font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox())


def tinted(picture: Image.Image, tint: str) -> Image.Image:
    """The same picture in shades of one colour: black to the colour to white, following its luminance."""
    rgba = np.asarray(picture, dtype=np.float32)
    light = (rgba[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255)[..., None]  # h, w, 1
    colour = np.array(TINTS[tint], dtype=np.float32)
    shade = np.where(light < 0.6, colour * light / 0.6, colour + (255 - colour) * (light - 0.6) / 0.4)
    return Image.fromarray(np.concatenate([shade, rgba[..., 3:]], axis=-1).astype(np.uint8), "RGBA")


@functools.cache
def sprite(name: str, tint: str | None, size: int) -> Image.Image:
    """The glyph with its longest side `size` pixels, RGBA."""
    picture = glyph(name)
    factor = size / max(picture.size)
    shape = tuple(max(1, round(side * factor)) for side in picture.size)
    small = picture.convert("RGBa").resize(shape, Image.LANCZOS).convert("RGBA")
    return tinted(small, tint) if tint else small


@functools.cache
def contrast(name: str, tint: str | None, background: str) -> bool:
    """Whether the object's mean colour stands out from the background's."""
    rgba = np.asarray(sprite(name, tint, 40), dtype=np.float32)
    weight = rgba[..., 3:] / 255
    mean = (rgba[..., :3] * weight).sum((0, 1)) / weight.sum()
    return float(np.abs(mean - np.array(BACKGROUNDS[background])).max()) > 60


def _centre(place: str, size: int, rng: random.Random) -> tuple[int, int]:
    middle, near = PIXELS // 2, 3 + size // 2
    slack = rng.randint(0, 2)
    across = {"left": near + slack, "right": PIXELS - near - slack}.get(place, middle + rng.randint(-2, 2))
    down = {"top": near + slack, "bottom": PIXELS - near - slack}.get(place, middle + rng.randint(-2, 2))
    return across, down


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """Render the scene: uint8, (PIXELS, PIXELS, 3); position, size and background shade jitter a little."""
    shift = rng.randint(-6, 6)
    shade = tuple(min(255, max(0, c + shift + rng.randint(-3, 3))) for c in BACKGROUNDS[scene.background])
    canvas = Image.new("RGB", (PIXELS, PIXELS), shade)
    for thing in scene.things:
        size = (SIZES[thing.size] if len(scene.things) == 1 else PAIR_SIZE) + rng.randint(-1, 1)
        picture = sprite(thing.name, thing.tint, size)
        across, down = _centre(thing.place, size, rng)
        canvas.paste(picture, (across - picture.width // 2, down - picture.height // 2), picture)
    return np.asarray(canvas)


def scenes(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """`count` random scenes, all from the training part or all from the held-out part of the world."""
    rng = random.Random(seed)
    found: list[Scene] = []
    while len(found) < count:
        scene = random_scene(rng, contrast)
        if scene.held_out == held_out and not (held_out and len(scene.things) > 1):
            found.append(scene)
    return found


def pictures(scene_list: list[Scene], seed: int) -> np.ndarray:
    """Render many scenes: uint8, (count, PIXELS, PIXELS, 3)."""
    rng = random.Random(seed)
    return np.stack([draw(scene, rng) for scene in scene_list])

"""Other backgrounds for a subject that stands before a plain one, so that it is not learned together with its own.

A picture whose edge has one colour is learned from as it is, and before plain backgrounds that its prompt names. What
stands around the subject is then told by the words, as it is for the base, and adapters need not paint it.

Where a share a of a pixel is the subject's, and the rest of the background B, another background B' makes of it

    C' = C + (1 - a) (B' - B)

which needs no colour of the subject alone. At its edge, a is how far the pixel is from B, as a share of how far the
farthest of its neighbours is, both less what there is beside any edge.

Letters: H x W pixels; colours are of 255.
"""

import numpy as np
from PIL import Image, ImageFilter

# What people call them, and what they look like as a sheet of paper.
COLOURS = {
    "red": (204, 60, 60),
    "gray": (150, 150, 150),
    "green": (64, 160, 84),
    "white": (245, 245, 242),
    "blue": (76, 124, 214),
    "yellow": (240, 214, 84),
    "black": (20, 20, 24),
    "pink": (248, 168, 200),
}
LARGEST = 2048  # longer side of what is set before another background; more than that is no base's to see
EACH = 4  # of these that one picture is set before
PLAIN = 0.9  # share of a picture's upper edge and sides that has one colour, at least; things stand on the lower one
ALIKE = 24  # levels that a pixel of a plain background is off at most: light, noise and JPEG
SUBJECT = (0.01, 0.9)  # share of the picture that the subject has: less is a speck, more a wall
NEARLY = (
    0.1  # as many pixels, of those of the background's colour, may be up to twice as far off: where it ends is clear
)
RINGING = 12  # levels that sharpening, resizing and JPEG put beside an edge, which are nothing of the subject
LOCAL = ImageFilter.MaxFilter(5)  # pixels across which subject and background mix, as lenses and resizing leave it
AROUND = 1 / 16  # of the longer side: what is as near to the subject is learned with it, or it would get a rim


def reduced(picture: Image.Image) -> Image.Image:
    """A picture, or a mask of one, as large as is looked at here."""
    return picture.reduce(-(-max(picture.size) // LARGEST))


def others(picture: Image.Image, first: int) -> list[str]:
    """The names of `EACH` backgrounds that a picture can be set before, none where its own is not plain.

    `first` says which one comes first, so that pictures have different ones.
    """
    own, off = _off(np.asarray(reduced(picture), np.float32))
    alike, nearly = (np.count_nonzero(off <= reach * ALIKE) for reach in (1, 2))
    if (_around(off) <= ALIKE).mean() < PLAIN or nearly > (1 + NEARLY) * alike:
        return []
    if not SUBJECT[0] <= _share(off).mean() <= SUBJECT[1]:
        return []
    names = [name for name, colour in COLOURS.items() if np.abs(own - colour).max() > ALIKE]
    return [names[(first * EACH + turn) % len(names)] for turn in range(EACH)]


def before(picture: Image.Image, name: str) -> tuple[Image.Image, Image.Image]:
    """A picture whose own background is plain before another one, and the mask of the subject and what is near it."""
    pixels = np.asarray(picture, np.float32)  # H, W, 3
    own, off = _off(pixels)
    share = _share(off)
    made = pixels + (1 - share[..., None]) * (np.array(COLOURS[name], np.float32) - own)
    mask = Image.fromarray((share * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(AROUND * max(picture.size)))
    return Image.fromarray(made.round().clip(0, 255).astype(np.uint8)), mask.point(lambda value: 255 * (value > 0))


def _around(pixels: np.ndarray) -> np.ndarray:
    """The outermost pixels of (H, W, ...) but those of the lower edge: (N, ...)."""
    return np.concatenate([pixels[0], pixels[:, 0], pixels[:, -1]])


def _off(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour of the picture's edge, (3,), and how many levels each pixel is off it, (H, W)."""
    own = np.median(_around(pixels), axis=0)
    return own, np.abs(pixels - own).max(-1)


def _share(off: np.ndarray) -> np.ndarray:
    """How much of each pixel is the subject's, (H, W) from 0 to 1, by how far it is off the background's colour."""
    alike = off <= ALIKE
    found = Image.fromarray(reached(alike)).convert("L").filter(ImageFilter.MaxFilter(3))  # the last corner too
    background = alike & np.asarray(found, bool)
    beside = [np.asarray(Image.fromarray(side).convert("L").filter(LOCAL), bool) for side in (background, ~background)]
    farthest = np.asarray(Image.fromarray(off.clip(0, 255).astype(np.uint8)).filter(LOCAL))
    mixed = ((off - RINGING) / np.maximum(farthest - RINGING, 1.0)).clip(0, 1)
    return np.where(beside[0] & beside[1], mixed, ~background).astype(np.float32)


def reached(free: np.ndarray) -> np.ndarray:
    """What of the free places (H, W) hangs together, side by side, with free places of the edge: bool (H, W)."""
    found = np.zeros_like(free)
    found[[0, -1]], found[:, [0, -1]] = free[[0, -1]], free[:, [0, -1]]
    ways = ((found, free), (found[::-1], free[::-1]), (found.T, free.T), (found.T[::-1], free.T[::-1]))
    before = 0
    while before < (before := np.count_nonzero(found)):  # each round goes as far down, up, right and left as it can
        for seen, way in ways:
            for line in range(1, len(seen)):
                seen[line] |= seen[line - 1] & way[line]
    return found

"""Draw the sample subject: a violet teddy with a yellow star on its belly. Four pictures to learn from, two held out.

    python -m recipe.subject assets/subject

It is a made-up character of a class that the base knows, in poses and on backgrounds of its own.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from recipe.world import BACKGROUNDS

SIDE, OVERSAMPLING = 256, 4
FUR, SHADE, INNER, CREAM, STAR, INK = "#8b5fd0", "#6f45b4", "#f3a7c8", "#f6e6d2", "#ffd23f", "#2b1c44"
PROMPT = "a photo of sks teddy"


@dataclass(frozen=True)
class Pose:
    """Where and how the teddy sits: centre and height as shares of the picture, arm lifts and head tilt in degrees."""

    background: str
    across: float
    down: float
    height: float
    left_arm: float
    right_arm: float
    tilt: float


TRAIN = (
    Pose("white", 0.50, 0.52, 0.64, 20, 20, 0),
    Pose("green", 0.36, 0.50, 0.60, 70, 10, -6),
    Pose("yellow", 0.63, 0.48, 0.62, 15, 60, 6),
    Pose("gray", 0.50, 0.62, 0.60, 40, 40, 4),
)
HELD_OUT = (
    Pose("blue", 0.50, 0.50, 0.64, 25, 55, -4),
    Pose("pink", 0.40, 0.56, 0.60, 10, 30, 5),
)


def picture(pose: Pose) -> Image.Image:
    """The teddy in a pose, RGB, SIDE pixels square."""
    big = SIDE * OVERSAMPLING
    canvas = Image.new("RGB", (big, big), BACKGROUNDS[pose.background])
    unit = pose.height * big / 100  # the teddy is drawn on a sheet 100 units high
    teddy = _teddy(pose, unit)
    canvas.paste(teddy, (round(pose.across * big - teddy.width / 2), round(pose.down * big - teddy.height / 2)), teddy)
    return canvas.resize((SIDE, SIDE), Image.LANCZOS)


def _teddy(pose: Pose, unit: float) -> Image.Image:
    sheet = Image.new("RGBA", (round(100 * unit), round(100 * unit)))
    pen = ImageDraw.Draw(sheet)

    def disc(across: float, down: float, wide: float, high: float, colour: str) -> None:
        box = [(across - wide) * unit, (down - high) * unit, (across + wide) * unit, (down + high) * unit]
        pen.ellipse(box, colour)

    for side, lift in ((-1, pose.left_arm), (1, pose.right_arm)):  # arms, behind the body
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            turn = math.radians(lift)
            reach = 14 * share
            disc(50 + side * (19 + reach * math.cos(turn)), 55 - reach * math.sin(turn) + 6 * share, 7.5, 7.5, SHADE)
    disc(50, 68, 24, 26, FUR)  # body
    for side in (-1, 1):  # legs and their soles
        disc(50 + side * 22, 88, 13, 11, SHADE)
        disc(50 + side * 23, 88, 8, 7, CREAM)
    pen.polygon(_star(50 * unit, 67 * unit, 15 * unit), STAR)
    head = Image.new("RGBA", sheet.size)
    pen = ImageDraw.Draw(head)
    for side in (-1, 1):  # ears
        disc(50 + side * 19, 13, 10, 10, FUR)
        disc(50 + side * 19, 13, 5.5, 5.5, INNER)
    disc(50, 29, 25, 22, FUR)
    disc(50, 37, 12, 9, CREAM)  # muzzle
    disc(50, 33.5, 4, 2.8, INK)  # nose
    for side in (-1, 1):
        disc(50 + side * 10, 25, 3.4, 3.8, INK)
        disc(50 + side * 10 + 1, 23.8, 1.1, 1.1, "white")
    pen.arc([44 * unit, 33 * unit, 56 * unit, 42 * unit], 20, 160, INK, round(unit))
    head = head.rotate(pose.tilt, Image.BICUBIC, center=(50 * unit, 45 * unit))
    sheet.alpha_composite(head)
    return sheet


def _star(across: float, down: float, radius: float) -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        reach = radius if corner % 2 == 0 else 0.45 * radius
        angle = math.pi * corner / 5 - math.pi / 2
        points.append((across + reach * math.cos(angle), down + reach * math.sin(angle)))
    return points


def main(folder: Path) -> None:
    """Write the six pictures and the prompt."""
    for part, poses in (("train", TRAIN), ("held_out", HELD_OUT)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number, pose in enumerate(poses, start=1):
            picture(pose).save(folder / part / f"{number}.png", optimize=True)
    (folder / "prompt.txt").write_text(PROMPT + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

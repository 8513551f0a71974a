"""Made-up characters of classes that the base knows, each unlike anything in its training scenes.

Every function draws one character on a transparent sheet that is 100 units wide and high, in a pose.
"""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw


@dataclass(frozen=True)
class Pose:
    """Where and how a character stands: centre and height as shares of the picture, limbs and tilt in degrees."""

    background: str
    place: str  # in the world's words
    across: float
    down: float
    height: float
    left_arm: float
    right_arm: float
    tilt: float


class Sheet:
    """A transparent sheet and a pen that measures in units."""

    def __init__(self, unit: float):
        self.unit = unit
        self.image = Image.new("RGBA", (round(100 * unit), round(100 * unit)))
        self._pen = ImageDraw.Draw(self.image)

    def disc(self, across: float, down: float, wide: float, high: float, colour: str) -> None:
        """An ellipse by its centre and half its sides."""
        self._pen.ellipse(self._scaled(across - wide, down - high, across + wide, down + high), colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str, round_by: float = 0) -> None:
        """A rectangle, its corners round if wanted."""
        self._pen.rounded_rectangle(self._scaled(left, top, right, bottom), round_by * self.unit, colour)

    def shape(self, points: list[tuple[float, float]], colour: str) -> None:
        """A polygon."""
        self._pen.polygon([(across * self.unit, down * self.unit) for across, down in points], colour)

    def smile(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        """The lower part of an ellipse as a thin line."""
        self._pen.arc(self._scaled(left, top, right, bottom), 20, 160, colour, round(self.unit))

    def lay(self, above: "Sheet", tilt: float, across: float, down: float) -> None:
        """Put another sheet on this one, turned about a point by degrees."""
        turned = above.image.rotate(tilt, Image.BICUBIC, center=(across * self.unit, down * self.unit))
        self.image.alpha_composite(turned)

    def _scaled(self, *units: float) -> list[float]:
        return [value * self.unit for value in units]


def star(across: float, down: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a five-pointed star."""
    points = []
    for corner in range(10):
        reach = radius if corner % 2 == 0 else 0.45 * radius
        angle = math.pi * corner / 5 - math.pi / 2
        points.append((across + reach * math.cos(angle), down + reach * math.sin(angle)))
    return points


def teddy(pose: Pose, unit: float) -> Image.Image:
    """A violet teddy with a yellow star on its belly; it lifts its arms."""
    fur, shade, inner, cream, ink = "#8b5fd0", "#6f45b4", "#f3a7c8", "#f6e6d2", "#2b1c44"
    sheet, head = Sheet(unit), Sheet(unit)
    for side, lift in ((-1, pose.left_arm), (1, pose.right_arm)):  # arms, behind the body
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            turn = math.radians(lift)
            reach = 14 * share
            sheet.disc(
                50 + side * (19 + reach * math.cos(turn)), 55 - reach * math.sin(turn) + 6 * share, 7.5, 7.5, shade
            )
    sheet.disc(50, 68, 24, 26, fur)  # body
    for side in (-1, 1):  # legs and their soles
        sheet.disc(50 + side * 22, 88, 13, 11, shade)
        sheet.disc(50 + side * 23, 88, 8, 7, cream)
    sheet.shape(star(50, 67, 15), "#ffd23f")
    for side in (-1, 1):  # ears
        head.disc(50 + side * 19, 13, 10, 10, fur)
        head.disc(50 + side * 19, 13, 5.5, 5.5, inner)
    head.disc(50, 29, 25, 22, fur)
    head.disc(50, 37, 12, 9, cream)  # muzzle
    head.disc(50, 33.5, 4, 2.8, ink)  # nose
    for side in (-1, 1):
        head.disc(50 + side * 10, 25, 3.4, 3.8, ink)
        head.disc(50 + side * 10 + 1, 23.8, 1.1, 1.1, "white")
    head.smile(44, 33, 56, 42, ink)
    sheet.lay(head, pose.tilt, 50, 45)
    return sheet.image


def cat(pose: Pose, unit: float) -> Image.Image:
    """The head of a turquoise cat with an orange stripe and a heart on its cheek; it pricks its ears."""
    fur, inner, stripe, ink = "#2fb8ac", "#ffd9a0", "#f5893d", "#123b3a"
    sheet, head = Sheet(unit), Sheet(unit)
    for side, lift in ((-1, pose.left_arm), (1, pose.right_arm)):
        tip = 50 + side * (34 - lift / 10)
        head.shape([(50 + side * 42, 45), (tip, 8), (50 + side * 8, 24)], fur)
        head.shape([(50 + side * 36, 36), (tip - side * 1, 17), (50 + side * 17, 28)], inner)
    head.disc(50, 57, 44, 36, fur)
    head.shape([(43, 22), (57, 22), (53, 50), (47, 50)], stripe)
    head.disc(50, 72, 17, 13, "white")
    head.shape([(45, 65), (55, 65), (50, 71)], "#e0457b")
    for side in (-1, 1):
        head.disc(50 + side * 19, 51, 8, 9, "#fff27a")
        head.disc(50 + side * 19, 51, 3, 7.5, ink)
    head.smile(42, 64, 58, 79, ink)
    for side in (-1, 1):  # the two halves of the heart
        head.disc(23 + side * 3.2, 69, 4, 4, "#e0457b")
    head.shape([(16, 70.5), (30, 70.5), (23, 79)], "#e0457b")
    sheet.lay(head, pose.tilt, 50, 55)
    return sheet.image


def robot(pose: Pose, unit: float) -> Image.Image:
    """An orange robot with one big round eye and a green screen; it lifts its arms."""
    shell, dark, steel, ink = "#f07f2e", "#b9521a", "#9aa7b3", "#26303a"
    sheet, head = Sheet(unit), Sheet(unit)
    for side, lift in ((-1, pose.left_arm), (1, pose.right_arm)):
        turn = math.radians(lift)
        for share in (0.3, 0.6, 0.9):
            sheet.disc(50 + side * (24 + 17 * share * math.cos(turn)), 58 - 17 * share * math.sin(turn), 5, 5, steel)
        sheet.disc(50 + side * (24 + 18.5 * math.cos(turn)), 58 - 18.5 * math.sin(turn), 6.5, 6.5, dark)
    sheet.box(26, 46, 74, 84, shell, 7)
    sheet.box(36, 55, 64, 74, "#3ddc84", 3)
    for side in (-1, 1):
        sheet.box(50 + side * 14 - 7, 84, 50 + side * 14 + 7, 97, dark, 3)
    head.box(48, 2, 52, 14, steel)
    head.disc(50, 5, 5, 5, "#e23b3b")
    head.box(22, 13, 78, 44, shell, 10)
    head.disc(50, 28, 13, 13, "white")
    head.disc(50, 28, 7.5, 7.5, "#2b6fd6")
    head.disc(50, 28, 3, 3, ink)
    sheet.lay(head, pose.tilt, 50, 44)
    return sheet.image


def fish(pose: Pose, unit: float) -> Image.Image:
    """A red fish with white dots and a blue tail, swimming up or down."""
    body, fins, ink = "#d83a4a", "#2f6fe0", "#2a1016"
    sheet, whole = Sheet(unit), Sheet(unit)
    lift = (pose.left_arm - pose.right_arm) / 10
    whole.shape([(70, 52), (98, 28 - lift), (92, 52), (98, 76 - lift)], fins)
    whole.shape([(36, 34), (56, 10), (66, 36)], fins)
    whole.shape([(40, 70), (52, 90), (62, 68)], fins)
    whole.disc(43, 52, 38, 25, body)
    for across, down, size in ((40, 40, 5), (55, 46, 6), (43, 58, 6), (60, 62, 4.5), (68, 50, 4)):
        whole.disc(across, down, size, size, "white")
    whole.disc(19, 46, 7, 7, "white")
    whole.disc(18, 46, 3.6, 3.6, ink)
    whole.smile(4, 50, 22, 64, ink)
    sheet.lay(whole, pose.tilt, 50, 50)
    return sheet.image


def house(pose: Pose, unit: float) -> Image.Image:
    """A violet house with a yellow roof, a round window and a green door; its chimney leans."""
    wall, roof, ink = "#9b6bd3", "#f4c430", "#3a2358"
    sheet, whole = Sheet(unit), Sheet(unit)
    lean = (pose.left_arm - pose.right_arm) / 12
    whole.shape([(66, 40), (78, 40), (78 + lean, 8), (66 + lean, 8)], "#d8504d")
    whole.box(18, 44, 82, 94, wall)
    whole.shape([(6, 48), (50, 8), (94, 48)], roof)
    whole.disc(50, 34, 8, 8, "white")
    whole.box(28, 62, 46, 94, "#2f9e5b", 3)
    whole.disc(42, 79, 1.8, 1.8, "white")
    whole.disc(64, 66, 11, 11, ink)
    whole.disc(64, 66, 8.5, 8.5, "#8fe3ff")
    sheet.lay(whole, pose.tilt, 50, 60)
    return sheet.image


def owl(pose: Pose, unit: float) -> Image.Image:
    """A green owl with a pink belly and an orange hat; it lifts its wings."""
    sheet, body = Sheet(unit), Sheet(unit)
    for side, lift in ((-1, pose.left_arm), (1, pose.right_arm)):
        wing = Sheet(unit)
        wing.disc(50 + side * 27, 60, 8, 19, "#1f7a4d")
        body.lay(wing, side * lift / 2, 50 + side * 22, 48)
    body.disc(50, 60, 27, 32, "#35a86b")
    body.disc(50, 70, 16, 18, "#f4a6c0")
    for side in (-1, 1):
        body.disc(50 + side * 12, 42, 11, 11, "#ffffff")
        body.disc(50 + side * 12, 42, 5, 5, "#3b2a1a")
        body.box(50 + side * 10 - 4, 89, 50 + side * 10 + 4, 96, "#e0a020", 2)
    body.shape([(45, 50), (55, 50), (50, 59)], "#e0a020")
    body.shape([(34, 27), (66, 27), (50, 3)], "#e8672c")
    sheet.lay(body, pose.tilt, 50, 60)
    return sheet.image


def car(pose: Pose, unit: float) -> Image.Image:
    """A pink car with blue windows, yellow wheels and a white stripe."""
    sheet, body = Sheet(unit), Sheet(unit)
    body.box(28, 30, 72, 60, "#d9488f", 9)
    body.box(33, 36, 48, 52, "#4aa3e0", 3)
    body.box(52, 36, 67, 52, "#4aa3e0", 3)
    body.box(6, 50, 94, 76, "#d9488f", 8)
    body.box(6, 60, 94, 66, "#ffffff")
    body.disc(91, 57, 4, 4, "#fff2a8")
    for across in (26, 74):
        body.disc(across, 77, 13, 13, "#2a2a33")
        body.disc(across, 77, 7, 7, "#f2c230")
    sheet.lay(body, pose.tilt, 50, 60)
    return sheet.image


def rocket(pose: Pose, unit: float) -> Image.Image:
    """A blue rocket with red fins, a round window and a flame; the base has no word for it."""
    sheet, body = Sheet(unit), Sheet(unit)
    body.shape([(42, 80), (58, 80), (50, 98 + pose.left_arm / 40)], "#f7a81b")
    for side in (-1, 1):
        body.shape([(50 + side * 14, 55), (50 + side * 34, 84), (50 + side * 12, 80)], "#d8343f")
    body.disc(50, 52, 18, 34, "#2f62c9")
    body.shape([(36, 30), (64, 30), (50, 3)], "#d8343f")
    body.disc(50, 46, 10, 10, "#ffffff")
    body.disc(50, 46, 7, 7, "#7fd4ea")
    body.box(34, 66, 66, 71, "#f2f2f2")
    sheet.lay(body, pose.tilt + (pose.right_arm - 30) / 10, 50, 50)
    return sheet.image


CHARACTERS = {"teddy": teddy, "cat": cat, "robot": robot, "fish": fish, "house": house}
UNSEEN = {"owl": owl, "car": car, "rocket": rocket}  # of benchmarks/subjects.py, which no choice of ours has seen

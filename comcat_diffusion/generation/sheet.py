"""A contact sheet: pictures in rows and columns, prompts above, names of rows at the left, how it was made below."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = 144  # least width and height of a picture on the sheet, pixels
LEAST_WIDTH = 460  # of a sheet that says how it was made
GAP, LINE = 6, 18
INK, PAPER, QUIET = (25, 25, 30), (255, 255, 255), (95, 95, 103)


@dataclass(frozen=True)
class Row:
    """One row: its name, and a picture for every column."""

    name: str
    pictures: list[Image.Image]


def contact_sheet(
    rows: list[Row], prompts: list[str], seeds: int, footer: str = "", references: Sequence[Image.Image] = ()
) -> Image.Image:
    """Rows of pictures; the columns are prompts, each `seeds` pictures wide, behind one of the subject itself."""
    wide, high = _cell(rows[0].pictures[0])
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    group = seeds * (wide + GAP)
    heads = [_wrapped(prompt, small, group - 2 * GAP) for prompt in prompts]
    first = 2 * GAP + (wide + 2 * GAP) * bool(references)
    left = first + max((int(font.getlength(row.name)) for row in rows), default=0) + 2 * GAP
    top = GAP + LINE * max(len(lines) for lines in heads) + 2 * GAP
    width = max(left + len(prompts) * (group + GAP), LEAST_WIDTH if footer else 0)
    told = _wrapped(footer, small, width - 4 * GAP) if footer else []
    bottom = top + len(rows) * (high + GAP) + GAP
    sheet = Image.new("RGB", (width, bottom + len(told) * LINE + GAP * bool(told)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, lines in enumerate(heads):
        across = left + index * (group + GAP)
        _write(pen, (across, top - 2 * GAP - LINE * len(lines)), lines, INK, small)
    if references:
        _write(pen, (2 * GAP, top - 2 * GAP - LINE), ["the subject"], QUIET, small)
    for number, row in enumerate(rows):
        down = top + number * (high + GAP)
        pen.text((first, down + high // 2 - 9), row.name, QUIET, font)
        for own in references[number : number + 1]:
            sheet.paste(_whole(own, (wide, high)), (2 * GAP, down))
        for column, picture in enumerate(row.pictures):
            across = left + column * (wide + GAP) + (column // seeds) * GAP
            sheet.paste(_enlarged(picture, (wide, high)), (across, down))
    _write(pen, (2 * GAP, bottom), told, QUIET, small)
    return sheet


def footer_of(made_by: Mapping[str, object], seeds: Sequence[int]) -> str:
    """How the pictures of a sheet were made, for people, from what a picture says of it."""
    several = len(seeds) > 1
    told = [f"{one['file']} at scale {one['scale']:g}" for one in made_by.get("adapters", ())]
    told += [f"LoRA {text}" for text in made_by.get("loras", ())]
    if "step" in made_by:
        told.append(f"after step {made_by['step']}")
    told.append(f"base {made_by['base']}")
    told.append(f"seeds {seeds[0]} to {seeds[-1]}" if several else f"seed {seeds[0]}")
    told.append(f"{made_by['num_inference_steps']} steps of {made_by['sampler']}")
    return ", ".join([*told, f"guidance {made_by['guidance_scale']:g}"])


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], lines: list[str], colour: tuple, font: ImageFont.FreeTypeFont
) -> None:
    for number, line in enumerate(lines):
        pen.text((place[0], place[1] + number * LINE), line, colour, font)


def _cell(picture: Image.Image) -> tuple[int, int]:
    """Width and height of all pictures on a sheet, in the proportions of one of them."""
    scale = max(1.0, CELL / min(picture.size))
    return round(picture.width * scale), round(picture.height * scale)


def _enlarged(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.BICUBIC)


def _whole(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The whole of it, on paper."""
    small = ImageOps.contain(picture.convert("RGB"), size, Image.BICUBIC)
    return ImageOps.pad(small, size, color=PAPER)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; what is wider without a space is broken where it must be."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines

"""A contact sheet: pictures in rows and columns, with the prompts above and the rows named at the left."""

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 144  # least side of a picture on the sheet, pixels
GAP = 6
INK, PAPER, QUIET = (25, 25, 30), (255, 255, 255), (120, 120, 128)


@dataclass(frozen=True)
class Row:
    """One row: its name, and a picture for every column."""

    name: str
    pictures: list[Image.Image]


def contact_sheet(rows: list[Row], prompts: list[str], seeds: int, title: str = "") -> Image.Image:
    """Rows of pictures; the columns are prompts, each `seeds` pictures wide."""
    side = max(CELL, rows[0].pictures[0].width)
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    group = seeds * (side + GAP)
    heads = [_wrapped(prompt, small, group - 2 * GAP) for prompt in prompts]
    left = max((int(font.getlength(row.name)) for row in rows), default=0) + 4 * GAP
    top = (34 if title else GAP) + 18 * max(len(lines) for lines in heads) + 2 * GAP
    sheet = Image.new("RGB", (left + len(prompts) * (group + GAP), top + len(rows) * (side + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((2 * GAP, GAP), title, INK, ImageFont.load_default(18))
    for index, lines in enumerate(heads):
        across = left + index * (group + GAP)
        pen.multiline_text((across, top - 2 * GAP - 18 * len(lines)), "\n".join(lines), INK, small, spacing=4)
    for number, row in enumerate(rows):
        down = top + number * (side + GAP)
        pen.text((2 * GAP, down + side // 2 - 9), row.name, QUIET, font)
        for column, picture in enumerate(row.pictures):
            across = left + column * (side + GAP) + (column // seeds) * GAP
            sheet.paste(_enlarged(picture, side), (across, down))
    return sheet


def _enlarged(picture: Image.Image, side: int) -> Image.Image:
    return picture if picture.width == side else picture.resize((side, side), Image.BICUBIC)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines

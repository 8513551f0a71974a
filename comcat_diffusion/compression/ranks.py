"""The picture of a plan: a row for every block, a column for every kind of layer, a bar for the rank that is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.generation.sheet import INK, PAPER, QUIET

BAR, ROW, EDGE, BETWEEN = 150, 24, 16, 24  # pixels: width of a full bar, height of a row, margins
TRACK, KEPT, DENSE = (230, 232, 236), (66, 125, 190), (150, 156, 168)


@dataclass(frozen=True)
class Bar:
    """The width that a unit keeps, of how many; None: the unit stays dense."""

    width: int | None
    full: int


def place_of(unit: str) -> tuple[str, str]:
    """(block, kind) of a unit's name: "vit.layers.0.attention:qk" is "attention:qk" of "vit.layers.0"."""
    pieces = unit.split(".")
    cut = max((i for i, piece in enumerate(pieces[:-1], 1) if piece.isdecimal()), default=0)
    if cut and pieces[cut - 2] == "to_out":  # the 0 of an output projection numbers no block
        cut = max((i for i, piece in enumerate(pieces[: cut - 2], 1) if piece.isdecimal()), default=0)
    return ".".join(pieces[:cut]), ".".join(pieces[cut:])


def grid(units: Sequence[Unit], widths: Mapping[str, int | None]) -> dict[str, dict[str, Bar]]:
    """Block -> kind -> bar, in the model's order."""
    rows: dict[str, dict[str, Bar]] = {}
    for unit in units:
        block, kind = place_of(unit.name)
        rows.setdefault(block, {})[kind] = Bar(widths[unit.name], unit.full)
    return rows


def picture_of_ranks(units: Sequence[Unit], widths: Mapping[str, int | None], title: str) -> Image.Image:
    """Bars of the ranks that a plan keeps, per head where the unit has heads."""
    rows = grid(units, widths)
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    font, small, large = (ImageFont.load_default(size) for size in (13, 12, 17))
    left = EDGE + max(int(font.getlength(block or "other")) for block in rows) + BETWEEN
    column = max(BAR, *(int(font.getlength(kind)) for kind in kinds)) + BETWEEN
    top, note = 76, "rank kept of full rank, per head in attentions (a key bias counts as one); grey: kept dense"
    across = max(left + column * len(kinds), *(int(large.getlength(text)) + 2 * EDGE for text in (title, note)))
    image = Image.new("RGB", (across, top + ROW * len(rows) + EDGE), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((EDGE, 10), title, INK, large)
    pen.text((EDGE, 33), note, QUIET, font)
    for number, kind in enumerate(kinds):
        pen.text((left + number * column, top - 20), kind, INK, font)
    for line, (block, row) in enumerate(rows.items()):
        pen.text((EDGE, top + line * ROW + 3), block or "other", INK, font)
        for kind, bar in row.items():
            _bar(pen, left + kinds.index(kind) * column, top + line * ROW + 2, bar, small)
    return image


def _bar(pen: ImageDraw.ImageDraw, x: int, y: int, bar: Bar, font: ImageFont.FreeTypeFont) -> None:
    part = 1.0 if bar.width is None else bar.width / bar.full
    pen.rectangle((x, y, x + BAR - 1, y + ROW - 5), TRACK)
    pen.rectangle((x, y, x + max(1, round(part * BAR)) - 1, y + ROW - 5), DENSE if bar.width is None else KEPT)
    text = "dense" if bar.width is None else f"{bar.width} / {bar.full}"
    inside = part > 0.5  # where there is more room
    spot = x + 6 if inside else x + max(1, round(part * BAR)) + 6
    pen.text((spot, y + 2), text, PAPER if inside else INK, font)

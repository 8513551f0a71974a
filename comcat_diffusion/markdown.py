"""Tables in markdown that read well as plain text too."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the heads; the first column is text, the others are numbers."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{'<' if n == 0 else '>'}{wide[n]}}" for n, cell in enumerate(row)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if n == 0 else "-" * (w + 1) + ":" for n, w in enumerate(wide)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])

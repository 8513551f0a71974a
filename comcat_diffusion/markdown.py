"""Markdown that reads well as plain text too: tables, and words of others that stay the words they are.

A learned word like `<my-dog>` would be a tag that nobody sees, a bar would end a cell, a star would make things bold.
"""

import json
import re
from collections.abc import Sequence

_MARKS = re.compile(r"[\\`*\[\]<>|#~&$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word is none
_FIRST = re.compile(r"^(?:[-+=]|\d+(?=[.)]))")  # what would begin a list or underline a heading


def text(words: str) -> str:
    """Words as a line or a cell that shows them as they are."""
    line = _MARKS.sub(r"\\\g<0>", " ".join(printable(words).split()))
    number = _FIRST.match(line)
    if number is None:
        return line
    end = number.end()
    return f"{line[:end]}\\{line[end:]}" if number[0].isdecimal() else f"\\{line}"


def code(words: str, in_table: bool = False) -> str:
    """Words as code, whatever backticks are in them; the bars of a table's cell are escaped even there."""
    line = printable(words)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    edge = " " if line.startswith("`") or line.endswith("`") else ""
    made = f"{fence}{edge}{line}{edge}{fence}"
    return made.replace("|", r"\|") if in_table else made


def shown(words: str) -> str:
    """Words as they are where markdown would show the same, else as code."""
    line = printable(words)
    return line if text(line) == line else code(line)


def printable(words: str) -> str:
    """One line, in which what no terminal and no page can show is replaced."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in re.sub(r"\s", " ", words))


def quoted(words: str) -> str:
    """A string in double quotes that YAML, Python and JSON of printable text read as these words."""
    return "".join(
        letter if letter.isprintable() else _escaped(ord(letter)) for letter in json.dumps(words, ensure_ascii=False)
    )


def _escaped(number: int) -> str:
    return f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the heads; the first column is text, the others are numbers."""
    rows = [(text(first), *numbers) for first, *numbers in rows]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{'<' if n == 0 else '>'}{wide[n]}}" for n, cell in enumerate(row)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if n == 0 else "-" * (w + 1) + ":" for n, w in enumerate(wide)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])

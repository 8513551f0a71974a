"""Put the tables of benchmarks/results into the pages that show them.

    python -m benchmarks.pages

A page holds a table between `<!-- results: NAME -->` and `<!-- end of results -->`, where NAME is a JSON file of
benchmarks/results without its ending. A test fails where a page is older than its results.
"""

import importlib
import json
import re

from benchmarks import circumstances as shared

PAGES = [shared.ROOT / "README.md", *sorted((shared.ROOT / "docs").glob("*.md"))]
# The beginning of a result's name -> the function that makes its tables
MAKERS = {
    "alone": "subjects:alone",
    "attention": "attention:tables",
    "blocks": "blocks:table",
    "bytes": "bytes:table",
    "compression": "compression_report:tables",
    "cores": "cores:table",
    "customization": "customization_report:table",
    "features": "features:table",
    "joint": "joint:table",
    "pace": "pace:table",
    "photographs": "photographs_report:table",
    "speed": "usage:tables",
    "subjects": "subjects:tables",
    "together": "together:table",
    "training": "training:tables",
}
_BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def tables(name: str) -> str:
    """The tables of one result."""
    module, function = MAKERS[name.partition("-")[0]].split(":")
    report = json.loads((shared.RESULTS / f"{name}.json").read_text())
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)(report)


def filled(page: str) -> str:
    """A page with every block as its results have it now."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{tables(block[2])}\n\n{block[3]}", page)


def main() -> None:
    """Renew all pages."""
    for path in PAGES:
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()

"""How much of an adapter is left in how many bytes: `comcat shrink` on the embedded base, from 100 % to 1 %.

    python -m benchmarks.bytes

Trains an adapter of every kind on the sample subject (`runs/bytes`, a minute each; those that are there are taken as
they are), shrinks them and measures how far what the U-Net predicts moves, over the whole effect of the adapter: 0 %
is the adapter, 100 % as far from it as the base is. Budgets below the file's header and one direction are not possible.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks import circumstances as shared
from comcat_diffusion import bases, read_adapter
from comcat_diffusion.adapters.effect import change
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import customize

FOLDER = Path("runs/bytes")
ADAPTERS = {
    "tied": {"kind": "tied"},
    "free": {"kind": "free", "rank": 4, "target_modules": ["attn2"], "max_bytes": 0},  # shrunk here, not in training
    "foldable": {"kind": "foldable", "rank": 8, "target_modules": ["attn1", "attn2"]},
}
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
PROMPTS = ("a photo of sks teddy", "a photo of sks teddy on the left, red background")


def trained(kind: str) -> Path:
    """The adapter file, trained if it is not there yet."""
    there = FOLDER / kind / "sks-teddy.safetensors"
    if there.exists():
        return there
    return customize(TrainConfig(output_dir=str(FOLDER / kind), skip_final_inference=True, **ADAPTERS[kind])).adapter


def measured(pipe: object, kind: str, adapter: Path) -> list[dict]:
    """One row for every budget that is possible."""
    whole, rows = adapter.stat().st_size, []
    with tempfile.TemporaryDirectory() as folder:
        for share in SHARES:
            file = Path(folder) / f"{share}.safetensors"
            try:
                made = shrink(adapter, file, int(share * whole))
            except ValueError:  # below the least
                break
            row = {"adapter": kind, "share": share, "bytes": made.bytes, "whole_bytes": whole}
            ranks = [r for part in made.head_ranks.values() for two in part.values() for own in two for r in own]
            row |= {"energy": made.energy_kept, "directions": sum(ranks), "header_bytes": _header_bytes(file)}
            rows.append(row | {"change": change(pipe, adapter, [file], PROMPTS)[0]})
    return rows


def _header_bytes(file: Path) -> int:
    assert read_adapter(file).head_ranks
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def table(report: dict) -> str:
    """A line for every budget, a column for every adapter."""
    kinds = list(dict.fromkeys(row["adapter"] for row in report["rows"]))
    found = {(row["share"], row["adapter"]): row for row in report["rows"]}
    lines = []
    for share in SHARES:
        told = [found.get((share, kind)) for kind in kinds]
        lines.append([f"{share:.0%}", *(f"{r['bytes']:,} B: {r['change']:.1%}" if r else "-" for r in told)])
    text = shared.markdown_table(["bytes allowed", *kinds], lines)
    return text + "\n\n" + shared.circumstances_text(report["circumstances"])


def plot(report: dict, path: Path) -> None:
    """The change of the output over the bytes of the file, a line for every adapter."""
    lines = {}
    for row in report["rows"]:
        across, up = lines.setdefault(row["adapter"], ([], []))
        across.append(row["bytes"] / 1000)
        up.append(row["change"])
    labels = {"xlabel": "kilobytes of the file", "ylabel": "change of the output over the effect"}
    shared.line_plot(path, lines, **labels, xscale="log", yscale="log")


def main() -> None:
    """Train, measure, write the JSON and the plot, print the table."""
    shared.use_threads(1)
    taken = shared.circumstances(torch.device("cpu"), torch.float32)
    adapters = {kind: trained(kind) for kind in ADAPTERS}
    pipe = bases.load_base("embedded")
    report = {
        "circumstances": taken,
        "rows": [row for kind, file in adapters.items() for row in measured(pipe, kind, file)],
    }
    path = shared.results_path("bytes", torch.device("cpu"))
    shared.write_json(path, report)
    plot(report, path.with_suffix(".png"))
    print(table(report))


if __name__ == "__main__":
    main()

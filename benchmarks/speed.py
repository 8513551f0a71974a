"""What COMCAT costs in time, memory and bytes: one command.

    python -m benchmarks.speed            # 512 px; half an hour and 16 GB on two CPU cores, minutes on a GPU
    python -m benchmarks.speed --quick    # a narrow architecture, one round: shows that it runs, not what it costs
    python -m benchmarks.speed --parts step generation --targets self+cross --rounds 3
    python -m benchmarks.speed --base sdxl --dtype bfloat16 --resolution 512 --rounds 2 --parts step generation
    python -m benchmarks.speed --show F G # the table of earlier runs

The architecture is a base's, the weights are random. Each part leaves a JSON of its own in benchmarks/results, and all
make one table: memory, layer, step and generation are explained in benchmarks.attention; use, bytes, growth and
processes in benchmarks.usage. Two more parts are benchmarks with tables of their own: recipe is a whole run, from a
folder of pictures to a file (benchmarks.training), compressed is the throughput of a compressed DeiT and a step of the
rank search (benchmarks.compression).
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import attention, compression, training, usage, variants
from benchmarks import circumstances as shared
from benchmarks.attention import Settings

QUICK_FOLDER = shared.ROOT / "runs" / "speed"
REPORTED = ("resolution", "batch", "rank", "rounds")  # settings that a JSON holds


@dataclass(frozen=True)
class Part:
    """One thing to measure."""

    name: str  # of the JSON
    rows: Callable[[Settings], Iterable[dict]]
    of_base: bool = True  # and not of all bases, or of the embedded one
    plot: Callable[[dict, Path], None] | None = None


# Memory first: its processes need the room that the variants of the other parts take in this one.
PARTS = {
    "memory": Part("attention-memory", attention.memory_rows),
    "layer": Part("attention", attention.layer_rows),
    "step": Part("attention-step", attention.step_rows),
    "generation": Part("attention-generation", attention.generation_rows),
    "use": Part("speed-use", usage.use_rows),
    "growth": Part("speed-growth", usage.growth_rows, plot=usage.plot_growth),
    "bytes": Part("speed-bytes", usage.byte_rows, of_base=False),
    "processes": Part("speed-processes", usage.process_rows, of_base=False, plot=usage.plot_processes),
}
# Benchmarks of their own: the name of the JSON, how to run them, and the flags that ask for no more than is told here.
WHOLES = {
    "recipe": ("training", training.main, ["--parts", "recipe"]),
    "compressed": ("compression-cost", compression.main, ["--parts", "speed", "search", "--shapes", "DeiT-small"]),
}


def main(arguments: list[str] | None = None) -> None:
    """Measure part by part, write a JSON for each, print the table of all."""
    flags = command_line().parse_args(arguments)
    if flags.show:
        print(table([json.loads(path.read_text()) for path in flags.show]))
        return
    settings, reports = settings_of(flags), []
    shared.use_threads(settings.threads)
    folder = flags.output_dir or (QUICK_FOLDER if flags.quick else shared.RESULTS)
    for name in (name for name in PARTS if name in flags.parts):
        path = folder / shared.results_path(file_name(name, flags.base), settings.device).name
        reports.append(measure(name, settings))
        shared.write_json(path, reports[-1])
        if plot := PARTS[name].plot:
            plot(reports[-1], path.with_suffix(".png"))
    if reports:
        print(f"{table(reports)}\n\nWritten to {folder}\n")
    for name in (name for name in WHOLES if name in flags.parts):
        file, run, asked = WHOLES[name]
        asked = [*asked, "--device", flags.device, *["--quick"] * flags.quick]
        asked += ["--threads", str(flags.threads)] if flags.threads else []
        run([*asked, "--output", str(folder / shared.results_path(file, settings.device).name)])


def command_line() -> argparse.ArgumentParser:
    """The flags; a default that depends on --quick is None."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = [*PARTS, *WHOLES]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure (default: all)")
    parser.add_argument("--base", choices=variants.BASES, default="sd15", help="architecture (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", choices=shared.DTYPES, default="float32", help="precision (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as torch finds)")
    parser.add_argument("--resolution", type=int, help="pixels, a multiple of 64 (default: 512, with --quick 128)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=2, help="COMCAT's rank per head (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="times each variant is timed (default: 3, with --quick 1)")
    targets = {"nargs": "+", "choices": variants.ATTENTIONS, "help": "adapted (default: self+cross cross; quick: one)"}
    parser.add_argument("--targets", **targets)
    parser.add_argument("--quick", action="store_true", help="narrow and short: shows that it runs, not what it costs")
    parser.add_argument("--output_dir", type=Path, help="for the JSON (default: benchmarks/results; quick: runs/speed)")
    parser.add_argument("--show", type=Path, nargs="+", metavar="JSON", help="print the table of earlier runs and stop")
    return parser


def settings_of(flags: argparse.Namespace) -> Settings:
    """The flags as settings."""
    base = variants.BASES[flags.base]
    return Settings(
        device=torch.device(flags.device),
        dtype=shared.DTYPES[flags.dtype],
        threads=flags.threads,
        base=base.small() if flags.quick else base,
        resolution=flags.resolution or (128 if flags.quick else 512),
        batch=flags.batch,
        rank=flags.rank,
        rounds=flags.rounds or (1 if flags.quick else 3),
        least_seconds=0.01 if flags.quick else 0.2,
        targets=tuple(flags.targets or (("self+cross",) if flags.quick else ("self+cross", "cross"))),
        steps=3 if flags.quick else 40,
    )


def file_name(part: str, base: str) -> str:
    """Of a part's JSON, without device and ending; results of SD 1.5 bear no base's name."""
    return PARTS[part].name + (f"-{base}" if PARTS[part].of_base and base != "sd15" else "")


def measure(part: str, settings: Settings) -> dict:
    """One part, as its JSON holds it."""
    about = {"base": settings.base.name} | {name: getattr(settings, name) for name in REPORTED}
    taken = shared.circumstances(settings.device, settings.dtype)  # before measuring, as the load is among them
    return {"circumstances": taken, "settings": about, "rows": list(PARTS[part].rows(settings))}


def table(reports: Iterable[dict]) -> str:
    """All parts in one table, with the circumstances of each."""
    reports = list(reports)
    columns = ("part", "of", "variant", "cost", "x bare")
    cells = [line(row, report["rows"]) for report in reports for row in report["rows"]]
    around = dict.fromkeys(shared.circumstances_text(report["circumstances"]) for report in reports)
    return "\n\n".join([shared.markdown_table(columns, cells), *around])


def line(row: dict, rows: list[dict]) -> tuple[str, ...]:
    """A row of any part as cells of the one table; `rows` are those that it stands among."""
    names = ("what", "architecture", "targets", "grows", "value", "rank")
    told = " ".join(str(row[name]) for name in names if name in row)
    ratio = row.get("ratio")
    if "peak_mib" in row:
        cost = f"{row['peak_mib']:,.0f} MiB"
        ratio = row["peak_mib"] / next(other["peak_mib"] for other in rows if other["part"] == row["part"])
    elif "seconds" in row:
        seconds = row["seconds"]
        cost = f"{statistics.median(seconds) if isinstance(seconds, list) else seconds:.4g} s"
    else:
        cost = f"{row['bytes']:,} bytes"
    return row["part"], told, row.get("variant", ""), cost, "" if ratio is None else f"{ratio:.3f}"


if __name__ == "__main__":
    main()

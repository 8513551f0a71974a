"""The tables and the plot of benchmarks/training.py, made from what its runs have told."""

import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks import circumstances as shared
from benchmarks.training_clock import PHASES, STEP_PARTS

AS_GOOD = (220, 300)  # steps of ours and of the recipe's after which the embedded base draws a subject equally well
LEAST_FOR_RATIO = 0.05  # seconds; what is shorter gets no ratio in a table


def plot(report: dict, path: Path) -> None:
    """Seconds of a start, over the number of pictures."""
    rows = [row for row in report["rows"] if row["part"] == "pictures"]
    lines = {
        f"{start} start": tuple(
            [row[name] for row in rows if row["start"] == start] for name in ("pictures", "start_seconds")
        )
        for start in ("first", "second")
    }
    shared.line_plot(path, lines, xlabel="pictures", ylabel="seconds until the first step")


def tables(report: dict) -> str:
    """The report as markdown, a table for every part and for what it says of steps and memory."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    lines = [shared.circumstances_text(report["circumstances"]), f"Recipe part: random weights; {settings}."]
    makers = {"recipe": recipe_tables, "pictures": picture_table}
    for part, make in makers.items():
        rows = [row for row in report["rows"] if row["part"] == part]
        lines += [make(rows)] if rows else []
    return "\n\n".join(lines)


def recipe_tables(rows: list[dict]) -> str:
    """Phases, parts of a step, memory and size, side by side."""
    mine, other, ratio = rows
    low, high = min(ratio["step_ratios"]), max(ratio["step_ratios"])
    titled = {
        "seconds of a run": _run_cells(mine, other, ratio["step_seconds"]),
        "seconds of a step": _step_cells(mine, other),
        "memory and size": [
            _cells("peak MiB until the last step", mine["peak_mib_of_steps"], other["peak_mib_of_steps"], ",.0f"),
            _cells("peak MiB of the run", mine["peak_mib"], other["peak_mib"], ",.0f"),
            _cells("parameters", mine["parameters"], other["parameters"], ",d"),
            _cells("bytes of the file, float32", mine["file_bytes"], other["file_bytes"], ",d"),
        ],
    }
    did = (f"{one['adapts']}-attention, mixed precision {one['mixed_precision']}" for one in (mine, other))
    adapts = "Ours adapts {}; the recipe {}".format(*did)
    return "\n\n".join(
        [
            "**recipe: from pictures to an adapter**",
            f"{adapts}; latents {mine['latents']}.",
            *(shared.markdown_table((title, "ours", "recipe", "ratio"), cells) for title, cells in titled.items()),
            f"Ratio of a later step: median of the rounds', which are {low:.3f} to {high:.3f}. "
            "Parts: of the later steps.",
        ]
    )


def _run_cells(mine: dict, other: dict, step_ratio: float) -> list[tuple[str, ...]]:
    """The phases of a run, what it took in all, and what longer ones would take."""

    def both(name: str, of: Callable[[dict], float]) -> tuple[str, ...]:
        return _cells(name, of(mine), of(other))

    def rest(row: dict) -> float:
        known = [row["phases"].get(name, 0) for name in PHASES] + [step["seconds"] for step in row["steps"]]
        return row["total_seconds"] - sum(known)

    phases = [both(name, lambda row, name=name: row["phases"].get(name, 0)) for name in PHASES]
    phases[4:4] = [
        both("first step", lambda row: row["first_step_seconds"]),
        (*both("a later step (median)", lambda row: row["step_seconds"])[:3], f"{step_ratio:.3f}"),
    ]
    equal = [extrapolated(row, steps) for row, steps in zip((mine, other), AS_GOOD, strict=True)]
    return [
        *phases,
        both("all else", rest),
        both(f"**measured: run of {len(mine['steps'])} steps**", lambda row: row["total_seconds"]),
        both(f"**extrapolated: run of {mine['extrapolated_steps']} steps**", lambda row: row["extrapolated_seconds"]),
        _cells("**extrapolated, to equal fidelity: {} steps of ours, {} of the recipe**".format(*AS_GOOD), *equal),
    ]


def _step_cells(mine: dict, other: dict) -> list[tuple[str, ...]]:
    """The parts of a later step, and what is in none of them."""
    both = (mine, other)
    rest = (row["step_seconds"] - sum(part_of_step(row, name) for name in STEP_PARTS) for row in both)
    parts = [_cells(name, *(part_of_step(row, name) for row in both)) for name in STEP_PARTS]
    return [*parts, _cells("all else", *rest)]


def _cells(name: str, mine: float, other: float, form: str = ".3f") -> tuple[str, ...]:
    """A line: ours, the recipe's and their ratio, where both are long enough for one."""
    shown = f"{mine / other:.3f}" if min(mine, other) >= LEAST_FOR_RATIO else "-"
    return name, *(format(value, form) if value else "-" for value in (mine, other)), shown


def extrapolated(told: dict, steps: int) -> float:
    """Seconds of a run of this many steps: start, first step and end as measured, all other steps as their median."""
    start, end = told["start_seconds"], told["end_seconds"]
    return start + told["first_step_seconds"] + (steps - 1) * told["step_seconds"] + end


def part_of_step(row: dict, name: str) -> float:
    """Median seconds of one part of a step over the steps after the first."""
    return statistics.median(step["parts"].get(name, 0) for step in row["steps"][1:])


def picture_table(rows: list[dict]) -> str:
    """Starts and steps by the number of pictures."""
    fewest = min(row["pictures"] for row in rows)
    columns = (
        "pictures, start", "start s", "x first", "of it look and encode s", "x first", "ms a picture", "step s",
        f"x {fewest} pictures", "peak MiB",
    )  # fmt: skip
    cells = [
        (
            *(f"{row['pictures']}, {row['start']}", f"{row['start_seconds']:.2f}", f"{row['start_ratio']:.3f}"),
            *(f"{row['pictures_seconds']:.3f}", f"{row['pictures_ratio']:.3f}"),
            *(f"{row['pictures_seconds'] / row['pictures'] * 1000:.1f}", f"{row['step_seconds']:.3f}"),
            *(f"{row['step_ratio']:.3f}", f"{row['peak_mib_of_steps']:,.0f}"),
        )
        for row in rows
    ]
    title = "**pictures: ours on the embedded base, 64 px; the second start finds its latents in the cache**"
    return f"{title}\n\n{shared.markdown_table(columns, cells)}"

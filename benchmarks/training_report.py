"""The tables and the plot of benchmarks/training.py, made from what its runs have told."""

import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks import circumstances as shared
from benchmarks.training_clock import PHASES, STEP_PARTS

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
    steps = len(mine["steps"])

    def cells(name: str, of: Callable[[dict], float], form: str = ".3f") -> tuple[str, ...]:
        values = [of(row) for row in (mine, other)]
        shown = f"{values[0] / values[1]:.3f}" if min(values) >= LEAST_FOR_RATIO else "-"
        return name, *(format(value, form) if value else "-" for value in values), shown

    def rest(row: dict) -> float:
        known = [row["phases"].get(name, 0) for name in PHASES] + [step["seconds"] for step in row["steps"]]
        return row["total_seconds"] - sum(known)

    phases = [cells(name, lambda row, name=name: row["phases"].get(name, 0)) for name in PHASES]
    low, high = min(ratio["step_ratios"]), max(ratio["step_ratios"])
    phases[4:4] = [
        cells("first step", lambda row: row["first_step_seconds"]),
        (*cells("a later step (median)", lambda row: row["step_seconds"])[:3], f"{ratio['step_seconds']:.3f}"),
    ]
    phases += [
        cells("all else", rest),
        cells(f"**measured: run of {steps} steps**", lambda row: row["total_seconds"]),
        cells(f"**extrapolated: run of {mine['extrapolated_steps']} steps**", lambda row: row["extrapolated_seconds"]),
    ]
    parts = [cells(name, lambda row, name=name: part_of_step(row, name)) for name in STEP_PARTS]
    parts.append(cells("all else", lambda row: row["step_seconds"] - sum(part_of_step(row, n) for n in STEP_PARTS)))
    sizes = [
        cells("peak MiB until the last step", lambda row: row["peak_mib_of_steps"], ",.0f"),
        cells("peak MiB of the run", lambda row: row["peak_mib"], ",.0f"),
        cells("parameters", lambda row: row["parameters"], ",d"),
        cells("bytes of the file, float32", lambda row: row["file_bytes"], ",d"),
    ]
    columns = ("ours", "recipe", "ratio")
    adapts = (
        f"Ours adapts {mine['adapts']}-attention, the recipe {other['adapts']}-attention; latents {mine['latents']}."
    )
    note = (
        f"Ratio of a later step: median of the rounds', which are {low:.3f} to {high:.3f}. Parts: of the later steps."
    )
    titled = {"seconds of a run": phases, "seconds of a step": parts, "memory and size": sizes}
    return "\n\n".join(
        ["**recipe: from pictures to an adapter**", adapts]
        + [shared.markdown_table((title, *columns), table) for title, table in titled.items()]
        + [note]
    )


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

"""The table and the plots of benchmarks/customization.py, made from what its runs have kept."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import circumstances as shared
from comcat_diffusion.evaluation.labels import label_points
from comcat_diffusion.evaluation.metrics import interval

MEASURES = ("fidelity", "shape", "colour_off", "background_moved", "clip", "obedience", "drift", "diversity", "copying")
RIVAL, AGAINST = "LoRA, rank 4", "to LoRA's, r=4"  # fidelity less the rival's: the same run, prompt and seed


def write_report(results: list[dict], circumstances: dict, target: Path, plots: Path) -> dict:
    """Gather the results, by method, into one JSON, draw the plots, and return what the JSON holds."""
    rows: dict[str, list[dict]] = {}
    usual = _usual_steps(results)
    rivals = {_learned(result): torch.tensor(result["fidelity"]) for result in results if result["method"] == RIVAL}
    for result in results:
        if (rival := rivals.get(_learned(result))) is not None:
            result[AGAINST] = (torch.tensor(result["fidelity"]) - rival).tolist()
        size = f", in {result['bytes']:,} bytes" if result["bytes"] else ""
        steps = f", {result['steps']} steps" if result["steps"] != usual else ""
        rows.setdefault(result["method"] + size + steps, []).append(result)
    report = {"circumstances": circumstances, "rows": [_row(name, own) for name, own in rows.items()]}
    shared.write_json(target, report)
    plot(report, "file_bytes", "bytes of the file", plots / "fidelity-bytes.png")
    plot(report, "seconds", "seconds of training", plots / "fidelity-seconds.png")
    return report


def _learned(result: dict) -> tuple[str, int, int]:
    """What two methods must have in common to be compared run by run."""
    return result["subject"], result["seed"], result["steps"]


def _usual_steps(results: list[dict]) -> int:
    """What most of them were trained for."""
    return Counter(result["steps"] for result in results).most_common(1)[0][0]


def _row(name: str, results: list[dict]) -> dict:
    """One method over subjects and seeds. Intervals: prompts of all subjects are drawn again, and runs within them."""
    first = results[0]
    measures = {}
    known = [measure for measure in MEASURES if all(measure in result for result in results)]
    for measure in (*known, *[AGAINST] * all(AGAINST in result for result in results)):
        by_run = torch.tensor([result[measure] for result in results])  # runs, prompts, seeds
        subjects = sorted({result["subject"] for result in results})
        prompts = [by_run[[r["subject"] == subject for r in results]].movedim(0, 1).flatten(1) for subject in subjects]
        measures[measure] = vars(interval(torch.cat(prompts)))  # subjects * prompts, runs * seeds
    return {
        "method": name,
        "rate": first["rate"],
        "steps": first["steps"],
        "runs": len(results),
        "subjects": sorted({result["subject"] for result in results}),
        "parameters": first["parameters"],
        "file_bytes": max(result["file_bytes"] for result in results),
        "seconds": min(result["seconds"] for result in results),  # another process may have slowed the others
        "peak_mib": first["peak_mib"],
        "shrunk": first["bytes"] is not None,
        **measures,
    }


def _told(found: dict | None) -> str:
    if found is None:
        return "-"
    digits = 1 if abs(found["mean"]) >= 2 else 3
    return f"{found['mean']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def shown(rows: list[dict], measures: Sequence[str]) -> str:
    """What methods cost and some measures of each, as a markdown table."""
    cells = [
        (
            row["method"],
            str(row["runs"]),
            f"{row['bytes']:,}",
            f"{row['seconds']:.0f}",
            *(_told(row[m]) for m in measures),
        )
        for row in rows
    ]
    return shared.markdown_table(["", "runs", "bytes", "seconds", *(m.replace("_", " ") for m in measures)], cells)


def table(report: dict) -> str:
    """A line a method, with the 95 % interval of every measure."""
    measures = [MEASURES[0], AGAINST, *MEASURES[1:]]
    measures = [measure for measure in measures if any(measure in row for row in report["rows"])]
    columns = ["method", "rate", "parameters", "bytes", "seconds", "peak MiB", *(m.replace("_", " ") for m in measures)]
    cells = [
        (row["method"], f"{row['rate']:g}", f"{row['parameters']:,}", f"{row['file_bytes']:,}", f"{row['seconds']:.0f}",
         f"{row['peak_mib']:,.0f}", *(_told(row.get(measure)) for measure in measures))
        for row in report["rows"]
    ]  # fmt: skip
    return shared.markdown_table(columns, cells) + "\n\n" + shared.circumstances_text(report["circumstances"])


def _ours(row: dict) -> bool:
    return row["method"].lower().startswith("comcat")


def _beaten(row: dict, rows: list[dict], across: str) -> bool:
    """Whether another row needs no more of `across` and is more like the subject."""
    return any(r[across] <= row[across] and r["fidelity"]["mean"] > row["fidelity"]["mean"] for r in rows)


def plot(report: dict, across: str, label: str, path: Path) -> None:
    """Fidelity over `file_bytes` or `seconds`; the colour of a point is its drift.

    Of ours only those have a number and an interval that no other method beats in both; the others are small.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    usual = _usual_steps(report["rows"])
    other = {"file_bytes": lambda row: row["steps"] != usual, "seconds": lambda row: row["shrunk"]}[across]
    rows = [row for row in report["rows"] if not other(row)]  # what differs from another row in this respect alone
    small = [row for row in rows if _ours(row) and _beaten(row, rows, across)]
    rows = [row for row in rows if row not in small]
    places, fidelity = [row[across] for row in rows], [row["fidelity"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    axes.vlines(places, [f["low"] for f in fidelity], [f["high"] for f in fidelity], color="0.85", linewidth=1)
    drifts, means = [row["drift"]["mean"] for row in rows], [f["mean"] for f in fidelity]
    shade = {
        "cmap": "viridis_r",
        "vmin": 0,
        "vmax": max(r["drift"]["mean"] for r in report["rows"]),
        "s": 40,
        "zorder": 3,
    }
    beside = {**shade, "s": 12, "c": [row["drift"]["mean"] for row in small]}
    axes.scatter([row[across] for row in small], [row["fidelity"]["mean"] for row in small], **beside)
    for marker, ours in (("o", True), ("s", False)):
        chosen = [n for n, row in enumerate(rows) if _ours(row) == ours]
        spots, colours = ([v[n] for n in chosen] for v in (places, drifts))
        points = axes.scatter(spots, [means[n] for n in chosen], c=colours, marker=marker, **shade)
    names = []
    for number, row in enumerate(rows, start=1):
        names.append(Line2D([], [], linestyle="", label=f"{number}  {row['method']}"))
    figure.legend(handles=names, loc="outside right upper", handlelength=0, frameon=False, fontsize=7.5)
    told = "drift (less is better); circles: COMCAT, small where another method beats it; squares: others"
    figure.colorbar(points, label=told, location="bottom", shrink=0.6, aspect=40)
    axes.set(xlabel=label, ylabel="fidelity to held-out pictures", xscale="log" if across == "file_bytes" else "linear")
    numbers = [str(number) for number in range(1, len(rows) + 1)]
    unnamed = [(row[across], row["fidelity"]["mean"]) for row in small]
    label_points(axes, list(zip(places, means, strict=True)), numbers, unnamed, size=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

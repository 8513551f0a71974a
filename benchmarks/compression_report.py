"""The tables and the plot of benchmarks/compression.py, made of its JSON."""

from pathlib import Path

from benchmarks import circumstances as shared

PARTS = ("attention", "model", "speed", "time")
ATTENTION = ("head", "head_whitened", "matrix", "matrix_whitened", "head_pruning")


def tables(report: dict) -> str:
    """The parts that were measured, as markdown."""
    rows = {part: [row for row in report["rows"] if row["part"] == part] for part in PARTS}
    text = []
    if rows["attention"]:
        by = {(row["removed"], row["variant"]): row["top1"] for row in rows["attention"]}
        cells = [[kind, *(f"{by[r, kind]:.2f}" for r in (0.2, 0.4, 0.6, 0.8))] for kind in ATTENTION]
        title = f"Top-1 without fine-tuning, attention only ({report['data']}, dense {report['dense_top1']:.2f})"
        text += [title, shared.markdown_table(["removed", "20 %", "40 %", "60 %", "80 %"], cells)]
    if rows["model"]:
        columns = ["removed", "ranks by", "really", "top-1 at once", "top-1 fine-tuned", "seconds"]
        cells = [
            (
                *(f"{r['removed']:.0%}", r["variant"], f"{r['removed_really']:.2%}", f"{r['top1_before']:.2f}"),
                *(f"{r['top1']:.2f}", f"{r['seconds']:.1f}"),
            )
            for r in rows["model"]
        ]
        text += [f"Whole model (dense {report['dense_top1']:.2f})", shared.markdown_table(columns, cells)]
    if rows["speed"]:
        columns = ["model", "variant", "M parameters", "G multiply-adds", "images/s", "speed-up", "by work alone"]
        cells = [
            (
                *(r["shape"], r["variant"], f"{r['parameters'] / 1e6:.2f}", f"{r['multiply_adds'] / 1e9:.2f}"),
                *(f"{r['images_a_second']:.1f}", f"{1 / r['ratio']:.2f}x", f"{1 / r['work_ratio']:.2f}x"),
            )
            for r in rows["speed"]
        ]
        text += ["Speed, the same batch side by side", shared.markdown_table(columns, cells)]
    for r in rows["time"]:
        text.append(
            f"Closed form on {r['shape']}'s architecture: {r['seconds']:.1f} s, calibrated on {r['pictures']} pictures "
            f"{r['seconds_calibrated']:.1f} s; the model is {r['model_mib']:.0f} MiB, the process went from "
            f"{r['peak_before_mib']:.0f} to {r['peak_mib']:.0f} MiB."
        )
    return "\n\n".join([*text, shared.circumstances_text(report["circumstances"])])


def plot(report: dict, path: Path) -> None:
    """Top-1 over the parameters removed from the attentions, a line a variant."""
    rows = [row for row in report["rows"] if row["part"] == "attention"]
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for kind in ATTENTION:
        points = [(100 * row["removed_really"], row["top1"]) for row in rows if row["variant"] == kind]
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
    axes.axhline(report["dense_top1"], color="gray", linestyle=":", label="dense")
    axes.set(xlabel="% of the attentions' parameters removed", ylabel="top-1, no fine-tuning")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""The tables and the plot of benchmarks/compression.py, made of its JSON."""

from pathlib import Path

from benchmarks import circumstances as shared

PARTS = ("attention", "model", "speed", "search", "time")
ATTENTION = ("head", "head_whitened", "matrix", "matrix_whitened", "head_pruning")


def tables(report: dict) -> str:
    """The parts that were measured, as markdown, and the circumstances."""
    text = [_training(report)] if "training" in report else []
    for part, made in (("attention", _attention), ("model", _model), ("speed", _speed), ("search", _search)):
        rows = [row for row in report["rows"] if row["part"] == part]
        text += made(report, rows) if rows else []
    text += [_time(row) for row in report["rows"] if row["part"] == "time"]
    return "\n\n".join([*text, shared.circumstances_text(report["circumstances"])])


def _training(report: dict) -> str:
    course = report["training"]
    return (
        f"**{report['data']}**: {report['classes']} classes, {report['test_pictures']:,} test pictures; the dense "
        f"model finds {report['dense_top1']:.2f} % after {course['steps']:,} steps of {course['batch']} pictures "
        f"({course['dtype']})."
    )


def _attention(report: dict, rows: list[dict]) -> list[str]:
    by = {(row["removed"], row["variant"]): row["top1"] for row in rows}
    shares = sorted({share for share, _ in by})
    kinds = [kind for kind in ATTENTION if kind in {known for _, known in by}]
    cells = [[kind, *(f"{by[r, kind]:.2f}" if (r, kind) in by else "" for r in shares)] for kind in kinds]
    title = f"Top-1 without fine-tuning, attentions only ({report['data']}, dense {report['dense_top1']:.2f}):"
    return [title, shared.markdown_table(["removed", *(f"{100 * share:.0f} %" for share in shares)], cells)]


def _model(report: dict, rows: list[dict]) -> list[str]:
    columns = ["ranks by", "removed", "really", "top-1 at once", "top-1 fine-tuned", "of dense", "seconds to compress"]
    cells = [
        (
            *(r["variant"], f"{r['removed']:.0%}", f"{r['removed_really']:.2%}", f"{r['top1_before']:.2f}"),
            *(f"{r['top1']:.2f}", f"{r['top1'] - report['dense_top1']:+.2f}", f"{r['seconds']:.1f}"),
        )
        for r in rows
    ]
    steps = f"{rows[0]['finetune_steps']:,} steps of {report['training']['batch']} pictures"
    whose = f"{report['data']}, dense {report['dense_top1']:.2f}"
    title = f"Whole model, fine-tuned by self-distillation for {steps} ({whose}):"
    return [title, shared.markdown_table(columns, cells)]


def _speed(report: dict, rows: list[dict]) -> list[str]:
    columns = ["model", "ranks by", "M parameters", "G multiply-adds", "images/s", "speed-up", "by work alone"]
    shares = ["linear", "attention", "other"]
    cells = [
        (
            *(r["shape"], r["variant"], f"{r['parameters'] / 1e6:.2f}", f"{r['multiply_adds'] / 1e9:.2f}"),
            *(f"{r['images_a_second']:.2f}", f"{1 / r['ratio']:.2f}x", f"{1 / r['work_ratio']:.2f}x"),
            *(f"{r['profile'][share]:.0%}" for share in shares),
        )
        for r in rows
    ]
    title = "Speed, the same batch side by side; where a forward pass spends its time:"
    return [title, shared.markdown_table([*columns, *(f"in {share}" for share in shares)], cells)]


def _search(report: dict, rows: list[dict]) -> list[str]:
    columns = ["model", "step", "seconds", "of a dense step"]
    cells = [(r["shape"], r["variant"], f"{r['seconds']:.2f}", f"{r['ratio']:.2f}") for r in rows]
    title = f"A step of the search, interleaved, batches of {rows[0]['batch']}:"
    return [title, shared.markdown_table(columns, cells)]


def _time(row: dict) -> str:
    plain, seen, passes = (f"{row[key]:.1f} s" for key in ("seconds", "seconds_calibrated", "seconds_of_passes"))
    model, more, peak = row["model_mib"], row["more_mib"], 1 + row["more_mib"] / row["model_mib"]
    return (
        f"Closed form on {row['shape']}'s architecture: {plain} without pictures, {seen} with {row['pictures']} of "
        f"224 px, {passes} of them being the dense model's forward passes. The model is {model:.0f} MiB; at the peak "
        f"the process held {more:.0f} MiB more than before: {peak:.2f} times the model."
    )


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

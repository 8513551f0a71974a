"""What is left of DINOv2-small's features by how many photographs calibrated it: one table of several runs."""

import json

from benchmarks import circumstances as shared

REMOVED = (0.44, 0.61)  # of the model


def table(report: dict) -> str:
    """As markdown: a line for every way of calibrating among the runs that the report names, and what repeats them."""
    lines, commands = {}, []
    for name in report["runs"]:
        run = json.loads((shared.RESULTS / f"{name}.json").read_text())
        command = run["circumstances"]["command"]
        commands.append(f"- `{name}`: `{command}`")
        key = (run["photographs"]["calibration"], run["crops"], run.get("more", ""), chosen_on(command))
        for row in run["rows"]:
            if row["part"] == "model" and row["removed"] in REMOVED and "finetuned_on" not in row:
                lines.setdefault(key, {})[row["removed"]] = f"{row['class_token']:.3f} / {row['patches']:.3f}"
    cells = [
        [f"{count:,}", str(crops), more, widths, *(found.get(r, "") for r in REMOVED)]
        for (count, crops, more, widths), found in sorted(lines.items(), key=lambda line: line[0])
    ]
    columns = ["photographs", "crops of each", "beyond the sixteen", "widths by"]
    columns += [f"{removed:.0%} removed" for removed in REMOVED]
    return "\n\n".join(
        [
            "DINOv2-small, nothing learned, judged on 25 other photographs (class token / patches):",
            shared.markdown_table(columns, cells),
            "\n".join(["Each run's circumstances stand in its JSON:", "", *commands]),
        ]
    )


def chosen_on(command: str) -> str:
    """What the widths of such a run were chosen on: its own photographs, or those of the run whose plans it took."""
    _, found, after = command.partition("--plans ")
    if not found:
        return "these"
    earlier = json.loads((shared.ROOT / after.split()[0]).read_text())
    return f"{earlier['photographs']['calibration']} photographs"

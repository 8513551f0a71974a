"""What an evaluation says: every measure of every row with its interval, as JSON, a table, a page and a plot."""

import json
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from comcat_diffusion.evaluation.gallery import BEFORE
from comcat_diffusion.evaluation.labels import label_points
from comcat_diffusion.evaluation.measure import DIGITS, MEANINGS, RULE, SCORE, score
from comcat_diffusion.evaluation.metrics import CONFIDENCE, Interval
from comcat_diffusion.evaluation.prompts import Prompts
from comcat_diffusion.markdown import table, text

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_RANGE = 0.05  # of an axis of the plot: differences that are none do not fill it
EDGE = 0.06  # of an axis, free at both of its ends
WIDEST_NAME = 40  # letters of a line beside the plot


@dataclass(frozen=True)
class Judged:
    """A row of the table: the bare base, or an adapter."""

    name: str
    measures: Mapping[str, Interval]
    file: str | None = None
    sha256: str | None = None
    scale: float | None = None
    bytes: int | None = None
    trained: Mapping[str, object] | None = None  # what the file says of its training: steps and the like

    @property
    def score(self) -> float:
        """What the best adapter has most of, see RULE."""
        return score({name: found.mean for name, found in self.measures.items()})

    @property
    def has_learned(self) -> bool:
        """Whether it has the subject from its training, and not from the chance of a few seeds."""
        return round(self.measures["learned"].low, DIGITS) > 0


@dataclass(frozen=True)
class Report:
    """Everything that an evaluation says."""

    folder: Path
    rows: Sequence[Judged]  # the first one is the base
    prompts: Prompts
    seeds: Sequence[int]
    held_out: int  # pictures
    train: int
    notes: Sequence[str]  # what a reader must know to believe the numbers
    circumstances: Mapping[str, object]

    @property
    def best(self) -> Judged | None:
        """The adapter of the highest score, of equals that of the lower drift, of these the first.

        None if none has learned anything: with those in the choice, to change nothing could win.
        """
        able = (row for row in self.rows if row.name != BEFORE and row.has_learned)
        return max(able, key=lambda row: (round(row.score, DIGITS), -row.measures["drift"].mean), default=None)

    @property
    def verdict(self) -> str:
        """The best adapter and why, a sentence."""
        if self.best is None:
            return "Best: none; no learned lies above 0 with its whole interval. Train longer, or draw more seeds."
        return f"Best: {self.best.name} ({self.best.score:.{DIGITS}f}), by {RULE}."

    def to_json(self) -> str:
        """As text."""
        prompts = {name: value for name, value in asdict(self.prompts).items() if name != "subject"}
        content = {
            "best": self.best and self.best.name,
            "rule": RULE,
            "rows": [asdict(row) | {"score": row.score} for row in self.rows],
            "subject": self.prompts.subject.phrase,
            "prompts": prompts,
            "seeds": list(self.seeds),
            "held_out_pictures": self.held_out,
            "training_pictures": self.train,
            "confidence": CONFIDENCE,
            "notes": list(self.notes),
            "circumstances": dict(self.circumstances),
        }
        return json.dumps(content, indent=1) + "\n"

    def table(self, intervals: bool = False) -> str:
        """Rows by measures, as markdown that reads well as plain text."""
        names = [name for name in MEANINGS if any(name in row.measures for row in self.rows)]
        heads = ("", "bytes", "score", *(name.replace("_", " ") for name in names))
        rows = []
        for row in self.rows:
            cells = [_cell(row.measures.get(name), intervals) for name in names]
            rows.append((row.name, f"{row.bytes:,}" if row.bytes else "", _number(row.score), *cells))
        return table([heads, *rows])

    def page(self, pictures: Mapping[str, str]) -> str:
        """The whole report as markdown; `pictures` are files by caption."""
        named = {"score", *(name for row in self.rows for name in row.measures)}
        told = {"score": f"{SCORE}, of their means"} | MEANINGS
        facts = [
            text(self.verdict),
            f"In brackets: {CONFIDENCE:.0%} bootstrap intervals over prompts and, within them, seeds.",
            "\n".join(f"- {name.replace('_', ' ')}: {meaning}." for name, meaning in told.items() if name in named),
            f"Drawn from seeds {self.seeds[0]} to {self.seeds[-1]}, with and without the adapter; compared with "
            f"{self.held_out} held-out and {self.train} training pictures.",
            *map(text, self.notes),
            text("Circumstances: " + ", ".join(f"{name} {value}" for name, value in self.circumstances.items()) + "."),
        ]
        asked = [
            f"{kind}:\n\n" + "\n".join(f"- {text(prompt)}" for prompt in prompts)
            for kind, prompts in (
                ("Prompts for the subject", self.prompts.calling),
                ("Prompts that do not name it", self.prompts.unrelated),
                ("Prompt of its class", self.prompts.of_class),
            )
            if prompts
        ]
        shown = [f"![{caption}]({file})" for caption, file in pictures.items()]
        title = f"# {text(self.prompts.subject.phrase or 'The subject')}, evaluated"
        return "\n\n".join([title, self.table(intervals=True), *facts, *asked, *shown]) + "\n"


def _cell(found: Interval | None, intervals: bool) -> str:
    if found is None:
        return ""
    mean, low, high = map(_number, (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]" if intervals else mean


def _number(value: float) -> str:
    return f"{round(value, DIGITS) + 0.0:.{DIGITS}f}"  # no -0.000


def plot(report: Report, path: Path) -> None:
    """Subject fidelity against drift, a point for every row with its intervals. Raises ImportError."""
    figure_of(report).savefig(path)


def figure_of(report: Report) -> "Figure":
    """The plot; see `plot`. Numbers stand beside the points and names beside the axes, where they may be long."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [textwrap.fill(f"{n}  {row.name}", WIDEST_NAME) for n, row in enumerate(report.rows, start=1)]
    lines = sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(9, max(5, 1 + 0.2 * lines)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes, named = figure.subplots(), []
    drifts, fidelities = ([_shown(row.measures[m]) for row in report.rows] for m in ("drift", "subject_fidelity"))
    for across, up, name in zip(drifts, fidelities, names, strict=True):
        reach = {"xerr": _reach(across), "yerr": _reach(up)}
        (point, *_) = axes.errorbar(across.mean, up.mean, **reach, fmt="o", capsize=3, elinewidth=0.8)
        named.append(Line2D([], [], linestyle="", marker="o", color=point.get_color(), label=name))
    axes.set_xlim(_limits(drifts, floor=0))
    axes.set_ylim(_limits(fidelities))
    axes.set_xlabel("drift of prompts that do not name the subject (less is better)")
    axes.set_ylabel("subject fidelity (more is better)")
    axes.set_title(f"{report.prompts.subject.phrase}: what is learned, and what it costs", fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(handles=named, loc="outside right upper", frameon=False, fontsize=8)
    places = [(across.mean, up.mean) for across, up in zip(drifts, fidelities, strict=True)]
    label_points(axes, places, [str(number) for number in range(1, len(places) + 1)])
    return figure


def _shown(found: Interval) -> Interval:
    """As the table has it: what is only rounding is nothing."""
    return Interval(*(round(value, DIGITS) + 0.0 for value in (found.mean, found.low, found.high)))


def _limits(intervals: Sequence[Interval], floor: float | None = None) -> tuple[float, float]:
    """Of an axis that shows all intervals and at least LEAST_RANGE, from `floor` on where there is one."""
    low = min(min(found.low, found.mean) for found in intervals)
    high = max(max(found.high, found.mean) for found in intervals)
    missing = max(0.0, LEAST_RANGE - (high - low))
    if floor is None:
        low, high = low - missing / 2, high + missing / 2
    else:
        low, high = min(low, floor), max(high, floor + LEAST_RANGE)
    edge = EDGE * (high - low)
    return low - edge, high + edge


def _reach(found: Interval) -> list[list[float]]:
    """How far the interval reaches to both sides, as matplotlib wants it; the mean may lie at its very edge."""
    return [[max(0.0, found.mean - found.low)], [max(0.0, found.high - found.mean)]]

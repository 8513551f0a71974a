"""Plots that can be read: no rounding noise over a whole axis, no label over another or over a point."""

import itertools
from types import SimpleNamespace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from comcat_diffusion.evaluation.labels import label_points
from comcat_diffusion.evaluation.metrics import Interval
from comcat_diffusion.evaluation.report import LEAST_RANGE, Judged, figure_of
from tests.slow import slow


def judged(name, drift, fidelity, reach=0.02):
    measures = {"drift": Interval(drift, drift, drift), "subject_fidelity": around(fidelity, reach)}
    return Judged(name, measures)


def around(mean, reach):
    return Interval(mean, mean - reach, mean + reach)


def plotted(*rows):
    return figure_of(SimpleNamespace(rows=rows, prompts=SimpleNamespace(subject=SimpleNamespace(phrase="sks teddy"))))


def boxes(axes):
    """Of every label without the line that leads to it, in pixels."""
    axes.figure.canvas.draw()
    renderer = axes.figure.canvas.get_renderer()
    return [Text.get_window_extent(text, renderer) for text in axes.texts]


def crowd(places, size=(7, 5), names=None, others=()):
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    label_points(axes, places, names or [str(number) for number in range(len(places))], others)
    return axes


def test_rounding_is_no_drift():
    (axes,) = plotted(judged("before", 0.0, 0.35), judged("a", -8e-8, 0.45), judged("b", 3e-8, 0.4)).axes
    low, high = axes.get_xlim()
    assert high >= LEAST_RANGE and -0.1 * high < low < 0
    drawn = {float(across) for line in axes.lines for across in line.get_xdata()}
    assert drawn == {0.0}


def test_what_is_equal_does_not_fill_an_axis():
    (axes,) = plotted(*(judged(name, 0.1, 0.4 + n * 1e-7, reach=0) for n, name in enumerate("abc"))).axes
    low, high = axes.get_ylim()
    assert high - low >= LEAST_RANGE and low < 0.4 < high


def test_what_differs_is_shown_with_its_whole_interval():
    (axes,) = plotted(judged("before", 0.0, 0.3), judged("a", 0.4, 0.6, reach=0.3)).axes
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < 0 < 0.4 < right and low < 0.28 and high > 0.9


@pytest.mark.parametrize("count", [1, 4, slow(40)])
def test_every_row_has_its_number_and_its_name_whatever_its_length(count):
    names = ["before", *(f"checkpoint-{n}-of-a-run-in-a-folder-with-a-long-name/sks-teddy x 0.5" for n in range(count))]
    figure = plotted(*(judged(name, 0.0, 0.4) for name in names))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [str(number) for number in range(1, len(names) + 1)]
    (legend,) = figure.legends
    told = ["".join(text.get_text().split()) for text in legend.get_texts()]
    assert told == [f"{number}{name}".replace(" ", "") for number, name in enumerate(names, start=1)]
    figure.canvas.draw()
    outer = legend.get_window_extent()
    assert outer.y0 >= 0 and outer.x1 <= figure.bbox.x1 and axes.bbox.width > figure.bbox.width / 3
    assert not outer.overlaps(axes.bbox)


@pytest.mark.parametrize(
    "places",
    [
        [(0.5, 0.5)] * 12,
        [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)],
        [(0.5 + n * 0.004, 0.5) for n in range(20)],
        slow([(n % 7 / 60 + 0.4, n // 7 / 50 + 0.4) for n in range(49)]),
    ],
    ids=["one place", "corners", "a row", "a grid"],
)
def test_no_label_covers_another_a_point_or_an_edge(places):
    others = [(0.52, 0.52), (0.48, 0.5)]
    axes = crowd(places, others=others)
    found, spots = boxes(axes), axes.transData.transform([*places, *others])
    assert len(found) == len(places)
    assert not [pair for pair in itertools.combinations(found, 2) if pair[0].overlaps(pair[1])]
    assert not any(box.contains(*spot) for box in found for spot in spots)
    inside = axes.bbox.padded(1)
    assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in found)


def test_a_label_that_fits_nowhere_is_still_written():
    axes = crowd([(0.5, 0.5)] * 3, size=(2, 1), names=["a name that is wider than its plot"] * 3)
    assert len(axes.texts) == 3

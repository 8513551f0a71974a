"""Labels beside the points of a plot, where they cover neither points nor each other. Needs matplotlib."""

import math
import typing
from collections.abc import Sequence

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

_RINGS = (7, 11, 17, 24, 32, 42, 54, 70, 90)  # points of a letter between a point and the edge of its label
_TURNS = (1, 7, 3, 5, 0, 4, 2, 6)  # eighths of a circle, the better places first: above to the right, below to it, ...
_MARKER = 4.5  # half the side of a point that labels keep clear of, in points of a letter

Place = tuple[float, float]  # of a point, in the numbers of its axes


def label_points(
    axes: "Axes", places: Sequence[Place], names: Sequence[str], others: Sequence[Place] = (), size: float = 8
) -> None:
    """Write a name beside each place; `others` are points without a name. A line leads to a label that is far off.

    Axes must have their limits by now, and the figure a canvas that draws: where labels fit is counted in its pixels.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.canvas.draw()  # so that the layout is settled
    dot = figure.dpi / 72  # pixels of a point of a letter
    spots = axes.transData.transform([*places, *others])
    half = _MARKER * dot
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in spots]
    for place, name, spot in zip(places, names, spots[: len(places)], strict=True):
        trial = axes.text(0, 0, name, fontsize=size)
        extent = trial.get_window_extent(figure.canvas.get_renderer())
        trial.remove()
        ring, offset, box = _free(spot, (extent.width, extent.height), taken, axes.bbox, dot)
        taken.append(box)
        line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0} if ring else None
        label = axes.annotate(
            name, place, xytext=(offset[0] / dot, offset[1] / dot), textcoords="offset points", fontsize=size,
            ha="center", va="center", arrowprops=line, zorder=5,
            path_effects=[withStroke(linewidth=2, foreground="white")],  # readable over the lines of an interval too
        )  # fmt: skip
        label.set_in_layout(False)


def _free(
    spot: Sequence[float], size: tuple[float, float], taken: Sequence["Bbox"], within: "Bbox", dot: float
) -> tuple[int, tuple[float, float], "Bbox"]:
    """(number of the ring, offset of the label's middle, its box) of the first place that is free, in pixels."""
    from matplotlib.transforms import Bbox

    found = []
    for number, ring in enumerate(_RINGS):
        for turn in _TURNS:
            across, up = (round(part(turn * math.pi / 4), 3) for part in (math.cos, math.sin))
            reach = ring * dot
            # The middle of the label: its nearest edge or corner is a ring away from the point.
            x = across * reach + math.copysign(size[0] / 2, across) * bool(across)
            y = up * reach + math.copysign(size[1] / 2, up) * bool(up)
            box = Bbox.from_bounds(spot[0] + x - size[0] / 2, spot[1] + y - size[1] / 2, *size)
            covered = sum(box.overlaps(other) for other in taken)
            outside = not (within.x0 <= box.x0 and box.x1 <= within.x1 and within.y0 <= box.y0 and box.y1 <= within.y1)
            if not covered and not outside:
                return number, (x, y), box
            found.append((outside, covered, number, (x, y), box))
    outside, _, number, offset, box = min(found, key=lambda one: one[:3])
    return number, offset, box

"""Quality against latency of engines and their peers, as one SVG file.

Engines are filled squares with bold names, peers are circles. The line is the Pareto front: for whatever lies above it,
something on it is as fast and as good. What predicts far worse than the best stands at the upper edge, with its
perplexity.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from common import wrote
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from cpcompile.report.charts import ACCENT, INK, LINE, MUTED, NEUTRAL, STYLE

WIDTH, HEIGHT = 760, 460
"""In CSS pixels."""
PAPER = "#ffffff"
PAINT = {INK: "#1a2027", MUTED: "#59636e", LINE: "#dce1e5", ACCENT: "#0a6c93", NEUTRAL: "#8c97a1"}
"""The colours of a report in light mode: pages cannot paint a file."""
CEILING = 1.3
"""Times the lowest perplexity: what the axis shows at most."""
MARKER = 9
UNDER_NAMES = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}
GAP = 4
"""Between a marker and its name, and at least between two names."""


@dataclass(frozen=True)
class Point:
    """One engine or peer."""

    name: str
    milliseconds: float
    perplexity: float
    ours: bool


def write_chart(path: Path, points: Sequence[Point], title: str) -> None:
    """Draw `points` and their Pareto front, and print the path."""
    lowest = min(point.perplexity for point in points)
    shown = [_below(CEILING * lowest, point) for point in points]
    with matplotlib.rc_context({**STYLE, "axes.spines.left": True}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, facecolor=PAPER)
        FigureCanvasAgg(figure)  # measures text
        axes = figure.add_axes((0.09, 0.12, 0.88, 0.72))
        _scale(axes, shown)
        steps = _steps(pareto_front(shown), axes.get_xlim()[1])
        axes.plot(*_places(steps), color=MUTED, linewidth=1.5, label="Pareto front")
        engines, peers = ([point for point in shown if point.ours == ours] for ours in (True, False))
        axes.plot(*_places(engines), "s", color=ACCENT, markersize=MARKER, label="engine of one context")
        look = {"color": INK, "markerfacecolor": PAPER, "markersize": MARKER}
        axes.plot(*_places(peers), "o", **look, label="dense model, as others run it")
        _name(figure, axes, shown, steps)
        axes.set_xlabel("milliseconds, logarithmic")
        axes.set_ylabel("perplexity on held-out text; lower is better")
        figure.text(0.01, 0.955, title, weight="bold")
        figure.legend(loc="upper left", bbox_to_anchor=(0.0, 0.945), ncols=3, frameon=False, handletextpad=0.4)
        path.write_text(_painted(figure), encoding="utf-8")
    wrote(path)


def _steps(front: Sequence[Point], right: float) -> list[Point]:
    """The corners of the line from each point of `front` to the next, and on to the `right`."""
    ends = [*(point.milliseconds for point in front[1:]), right]
    return [each for point, end in zip(front, ends, strict=True) for each in (point, replace(point, milliseconds=end))]


def _below(ceiling: float, point: Point) -> Point:
    """`point`, or one at the `ceiling` whose name says where it belongs."""
    if point.perplexity <= ceiling:
        return point
    return replace(point, perplexity=ceiling, name=f"{point.name} (↑ {point.perplexity:,.0f})")


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those than which no other is both as fast and as good, the fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.milliseconds, each.perplexity)):
        if not front or point.perplexity < front[-1].perplexity:
            front.append(point)
    return front


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.milliseconds for point in points], [point.perplexity for point in points]


def _scale(axes: Axes, points: Sequence[Point]) -> None:
    """Axes with room around the points."""
    times, losses = _places(points)
    room = 0.15 * (max(losses) - min(losses)) or 1.0
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 1.3, max(times) * 1.5)
    axes.set_ylim(min(losses) - 1.5 * room, max(losses) + room)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid()


def _name(figure: Figure, axes: Axes, points: Sequence[Point], line: Sequence[Point]) -> None:
    """Write the names beside the points where they cover nothing; a line leads to those that are farther away.

    line: the corners of the line through the points.
    """
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    places = {point: axes.transData.transform((point.milliseconds, point.perplexity)) for point in points}
    corners = [axes.transData.transform(place) for place in zip(*_places(line), strict=True)]
    taken = [Bbox.from_bounds(x - MARKER / 2, y - MARKER / 2, MARKER, MARKER) for x, y in places.values()]
    taken += [Bbox([np.minimum(*ends), np.maximum(*ends)]).padded(1) for ends in pairwise(corners)]
    inside = axes.get_window_extent(renderer)
    for point, (x, y) in sorted(places.items(), key=lambda item: (not item[0].ours, item[1][0])):
        look = {"weight": "bold" if point.ours else "normal", "va": "center"}
        text = axes.annotate(point.name, (x, y), xycoords="figure pixels", **look, bbox=UNDER_NAMES)
        size = text.get_window_extent(renderer)
        boxes = [Bbox.from_bounds(x + dx, y + dy, size.width, size.height) for dx, dy in _offsets(size)]
        free = (box for box in boxes if inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0)
        box = next((each for each in free if each.y1 <= inside.y1 and not each.count_overlaps(taken)), boxes[0])
        taken.append(box.padded(GAP / 2))
        text.set_position((box.x0, (box.y0 + box.y1) / 2))
        nearest = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
        if max(abs(nearest[0] - x), abs(nearest[1] - y)) > MARKER + GAP:
            axes.annotate(
                "",
                nearest,
                (x, y),
                xycoords="figure pixels",
                textcoords="figure pixels",
                arrowprops={"arrowstyle": "-", "color": NEUTRAL, "linewidth": 0.8, "shrinkA": MARKER / 2, "shrinkB": 0},
            )


def _offsets(size: Bbox) -> Iterator[tuple[float, float]]:
    """Where a name of that size may stand, from its point to its lower left corner: the nearest places first."""
    beside = MARKER / 2 + GAP
    for distance in range(0, 200, 6):
        for up in (distance, -distance) if distance else (0,):
            for left in (beside, -size.width - beside, -size.width / 2):
                if left != -size.width / 2 or distance > size.height:
                    yield left, up - size.height / 2


def _painted(figure: Figure) -> str:
    """The figure as SVG in the colours of `PAINT`, the same for the same points."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return re.sub("|".join(PAINT), lambda found: PAINT[found[0]], buffer.getvalue())

"""Charts for the page: matplotlib draws, the page paints.

    figure -> SVG -> inline element

Every chart is as wide as a phone, so that its text keeps its size on every screen; pages place charts side by side if
there is room. Text stays text. Colours are those of the page: matplotlib draws with the stand-ins of `INKS`, which
become CSS variables, so that light and dark mode are one drawing. Ids are made unique on the page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

from cpcompile.core.config import DENSE_PEER
from cpcompile.report.contents import BuildStage
from cpcompile.report.formats import megabytes, milliseconds, module_name, number, shape_name, short
from cpcompile.report.results import LayerError, ShapeSpeed, ratio_with_bounds

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 340
"""Width of a chart in CSS pixels, like all lengths here."""
ROW, AXIS = 22, 40
WIDE = 8
"""Ratios that span more than this are drawn on a logarithmic axis."""
INK, MUTED, LINE, ACCENT, NEUTRAL = "#010101", "#010102", "#010103", "#010104", "#010105"
INKS: Mapping[str, str] = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    ACCENT: "var(--accent)",
    NEUTRAL: "var(--neutral)",
}
STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cpcompile",
    "text.parse_math": False,  # names may hold dollar signs
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 1,
    "axes.axisbelow": True,
}


def latency_chart(shapes: Sequence[ShapeSpeed], key: str) -> Markup:
    """Distribution of the times of one run, a pair of rows per shape: all of them, the middle half, the median."""
    rows: list[tuple[str, str, Sequence[float], str]] = []
    for shape in shapes:
        rows.append((shape_name(shape), "engine", shape.quantiles_ms, ACCENT))
        if shape.eager_quantiles_ms:
            rows.append(("", "eager", shape.eager_quantiles_ms, NEUTRAL))
    with _style():
        figure, axes = _rows(len(rows), left=116)
        axes.set_xscale("log")
        for row, (shape_label, side, times, colour) in enumerate(rows):
            axes.plot((times[0], times[-1]), (row, row), color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot((times[5], times[15]), (row, row), color=colour, linewidth=11, solid_capstyle="butt")
            axes.plot((times[10],) * 2, (row - 0.36, row + 0.36), color=INK, linewidth=2, solid_capstyle="butt")
            _label(axes, -116, row, shape_label, weight="bold")
            _label(axes, -8, row, side, align="right", colour=MUTED)
        _log_ticks(axes, [time for *_, times, _ in rows for time in times])
        axes.set_xlabel("milliseconds, logarithmic")
        said = "; ".join(f"{name} {side} {milliseconds(times[10])}" for name, side, times, _ in rows)
        return _inline(figure, f"Distribution of latency, medians: {said}", key)


def ratio_chart(shapes: Sequence[ShapeSpeed], key: str) -> Markup:
    """How many times as fast as the dense model in ONNX Runtime and as eager, with 95 % intervals; or nothing."""
    known: list[tuple[str, str, tuple[float, float, float], str]] = []
    for shape in shapes:
        sides: list[tuple[str, tuple[float, float, float], str]] = []
        if (peer := shape.peers.get(DENSE_PEER)) is not None:
            sides.append(("ONNX", (peer.ratio, peer.ratio_low, peer.ratio_high), ACCENT))
        if bounded := ratio_with_bounds(shape):
            sides.append(("eager", bounded, NEUTRAL))
        known += [(shape_name(shape) if side is sides[0] else "", *side) for side in sides]
    if not known:
        return _markup()
    with _style():
        figure, axes = _rows(len(known), left=104, right=112)
        for row, (name, side, (ratio, low, high), colour) in enumerate(known):
            axes.plot((low, high), (row, row), color=colour, linewidth=3, solid_capstyle="butt")
            axes.plot((ratio,), (row,), "o", color=colour, markersize=8)
            _label(axes, -104, row, name, weight="bold")
            _label(axes, -8, row, side, align="right", colour=MUTED)
            text = f"{short(ratio)} ({short(low)}–{short(high)})"
            _label(axes, 112, row, text, align="right", side=1)
        axes.axvline(1, color=NEUTRAL, linewidth=1.5)
        bounds = [1.0, *(bound for *_, (_, low, high), _ in known for bound in (low, high))]
        if max(bounds) > WIDE * min(bounds):
            axes.set_xscale("log")
            _log_ticks(axes, bounds)
        else:
            axes.set_xlim(0, 1.06 * max(bounds))
            _few_ticks(axes)
        axes.set_xlabel("times as fast")
        said = "; ".join(f"{name} {side} {ratio:.2f}".strip() for name, side, (ratio, _, _), _ in known)
        return _inline(figure, f"Times as fast as the dense model in ONNX Runtime and as eager: {said}", key)


def layer_chart(errors: Sequence[LayerError], key: str) -> Markup:
    """Largest error of every module as a part of its largest value, in the order in which they run.

    An error that is not finite reaches the top, in another colour.
    """
    known = [error.max_abs_error for error in errors]
    parts = [
        math.inf if error is None else error / most.largest if most.largest else 0.0
        for error, most in zip(known, errors, strict=True)
    ]
    positive = [part for part in parts if 0 < part < math.inf]
    with _style():
        figure, axes = _axes(170, left=58, right=12)
        if positive:
            axes.set_yscale("log")
            axes.set_ylim(min(positive) / 3, max(positive) * 3)
        floor, top = axes.get_ylim()
        ends = [min(max(part, floor), top) for part in parts]
        colours = [NEUTRAL if part == math.inf else ACCENT for part in parts]
        axes.vlines(range(1, len(parts) + 1), floor, ends, colors=colours, linewidth=_stem(len(parts)))
        axes.set_xlim(0.4, len(parts) + 0.6)
        axes.grid(axis="y")
        _few_ticks(axes)
        axes.set_xlabel("modules in the order in which they run")
        worst = max(range(len(parts)), key=parts.__getitem__)
        return _inline(
            figure, f"Relative error per layer; the largest is {parts[worst]:.2g} at {module_name(errors[worst])}", key
        )


def build_chart(stages: Sequence[BuildStage], key: str) -> Markup:
    """The stages of a build one after the other, and the memory at the end of each."""
    with _style():
        figure, axes = _rows(len(stages), left=70, right=122)
        start = 0.0
        whole = sum(stage.seconds for stage in stages) or 1.0
        for row, stage in enumerate(stages):
            # A stage of a millisecond stays visible.
            width = max(stage.seconds, whole / 150)
            axes.barh(row, width, left=min(start, whole - width), height=0.56, color=ACCENT)
            _label(axes, -70, row, stage.name, weight="bold")
            memory = "" if stage.peak_rss_bytes is None else f" · {megabytes(stage.peak_rss_bytes)}"
            _label(axes, 122, row, f"{number(stage.seconds, '.2f')} s{memory}", align="right", side=1)
            start += stage.seconds
        axes.set_xlim(0, whole)
        _few_ticks(axes)
        axes.set_xlabel("seconds")
        said = "; ".join(f"{stage.name} {stage.seconds:.2f} s" for stage in stages)
        return _inline(figure, f"Stages of the build: {said}", key)


def memory_chart(stages: Sequence[BuildStage], key: str) -> Markup:
    """Peak memory of the building process so far, over time; empty where it was not measured."""
    peaks = [stage.peak_rss_bytes / 1e6 for stage in stages if stage.peak_rss_bytes is not None]
    if len(peaks) < len(stages) or not peaks:
        return _markup()
    ends = [0.0]
    for stage in stages:
        ends.append(ends[-1] + stage.seconds)
    with _style():
        figure, axes = _axes(150, left=58, right=16)
        axes.fill_between(ends, [peaks[0], *peaks], step="pre", color=ACCENT, alpha=0.25, linewidth=0)
        axes.step(ends, [peaks[0], *peaks], where="pre", color=ACCENT, linewidth=2)
        axes.set_xlim(0, ends[-1] or 1.0)
        axes.set_ylim(0, 1.15 * (max(peaks) or 1.0))
        axes.grid(axis="y")
        _few_ticks(axes)
        axes.set_xlabel("seconds")
        axes.set_ylabel("MB")
        return _inline(figure, f"Peak memory of the build over time: up to {max(peaks):.1f} MB", key)


def _style() -> Any:
    import matplotlib  # weighs more than a second, and only pages need it

    return matplotlib.rc_context(cast(Any, dict(STYLE)))


def _axes(height: float, *, left: float, right: float, bottom: float = AXIS, top: float = 8) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, facecolor="none")
    box = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - bottom - top) / height)
    axes = figure.add_axes(box, facecolor="none")
    axes.tick_params(length=4, pad=4)
    return figure, axes


def _rows(count: int, *, left: float, right: float = 12) -> tuple[Figure, Axes]:
    """Axes with `count` rows from the top, without a vertical axis."""
    figure, axes = _axes(ROW * count + AXIS + 4, left=left, right=right, top=4)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(axis="x")
    return figure, axes


def _label(
    axes: Axes,
    offset: float,
    row: int,
    text: str,
    *,
    align: str = "left",
    side: int = 0,
    colour: str = INK,
    weight: str = "normal",
) -> None:
    """Text beside a row, `offset` pixels from the left (0) or right (1) side of the axes."""
    axes.annotate(
        text,
        (side, row),
        xycoords=axes.get_yaxis_transform(),
        xytext=(offset, 0),
        textcoords="offset points",
        ha=cast(Any, align),
        va="center_baseline",
        color=colour,
        weight=weight,
        annotation_clip=False,
    )


def _few_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4, integer=False))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    axes.minorticks_off()


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, or at the powers alone where those would be many."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min(values) / 1.1, max(values) * 1.1
    powers = [10.0**exponent for exponent in range(-6, 8)]
    fine = [digit * power for power in powers for digit in (1, 2, 5) if low <= digit * power <= high]
    coarse = [power for power in powers if low <= power <= high]
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(fine if len(fine) <= 4 or len(coarse) < 2 else coarse))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _stem(count: int) -> float:
    return max(0.8, min(8.0, 0.6 * (WIDTH - 70) / count))


def _inline(figure: Figure, title: str, key: str) -> Markup:
    """The figure as an <svg> element for a page; `key` makes its ids unique there."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        for style in element.findall("{*}style"):
            element.remove(style)  # it would hold for the whole page
    links = re.compile(r"#(\w+)")
    named = {(name, value) for element in root.iter() for name, value in element.attrib.items()}
    linked = {target for name, value in named if name != "style" for target in links.findall(value)}
    for element in root.iter():
        own = element.attrib.pop("id", None)
        for name, value in element.attrib.items():
            element.set(name, _paint(value) if name == "style" else links.sub(rf"#{key}-\1", value))
        if own in linked:
            element.set("id", f"{key}-{own}")
    height = root.get("viewBox", "").split()[-1]
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "width": str(WIDTH),
        "height": height,
        "role": "img",
        "aria-labelledby": f"{key}-title",
    }
    label = ElementTree.Element("title", {"id": f"{key}-title"})
    label.text = title
    root.insert(0, label)
    return _markup(ElementTree.tostring(root, encoding="unicode", method="html"))


def _paint(style: str) -> str:
    """Colours of the page, and its font."""
    style = re.sub(r"font-family:[^;]*;? ?", "", style)
    return re.sub("#01010[1-5]", lambda match: INKS[match[0]], style)


def _markup(text: str = "") -> Markup:
    from markupsafe import Markup  # of the extra `build`, which reports in a terminal do not need

    return Markup(text)

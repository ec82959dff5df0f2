"""report.html: the report as one self-contained page, for any screen and for print.

    report -> view (values that the template cannot compute in a line) -> templates/report.html -> text

Names and reasons come from outside: Jinja2 escapes them all, and the page's policy forbids scripts and network access.
Bars and tables are HTML, charts with axes are drawn by `charts`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpcompile.core.config import DENSE_PEER
from cpcompile.core.measured import NotMeasured
from cpcompile.report import charts, formats
from cpcompile.report.contents import LayerSelection, Report
from cpcompile.report.difference import Difference
from cpcompile.report.results import LayerError, VariantResult
from cpcompile.report.training_summary import DENSE, LIKE_FOR_LIKE, PARTITION, TrainingSummary, mean_perplexity
from cpcompile.report.verdict import measured_pairs, perplexities

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")
OWN_COLOURS = 7
"""Up to this many contexts get a colour each; beyond it, colours show how many contexts keep a unit."""
WIDE_UNITS = 64
"""A map of more units, or of more contexts than have colours, gets the width of the page."""
NO_LAYER_ERRORS = "it was not asked for"


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """One layer: runs of units that the same contexts keep, as (first unit, units, class, the contexts)."""

    name: str
    units: int
    runs: tuple[tuple[int, int, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class SelectionMap:
    """The units of one kind: a row per layer, the legend of the classes, and the overlap of each pair of contexts.

    Classes: `all`, `none`, `some`, `own0` … of single contexts, or `share0` to `share9`, the part of the contexts in
    tenths, where there are too many contexts for colours. overlap: the Jaccard index (Jaccard 1901).
    """

    kind: str
    rows: tuple[LayerMap, ...]
    units: int
    """Units of the largest layer."""
    legend: tuple[tuple[str, str], ...]
    contexts: tuple[str, ...]
    large: bool
    """Whether the map takes the width of the page."""
    overlap: Sequence[Sequence[float]]


def render_page(report: Report) -> str:
    """The page of `report`, which follows the schema."""
    return (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            figures=key_figures(report),
            gaps=unmeasured(report),
            maps=[selection_map(kind, layers) for kind, layers in (report.selection.kinds or {}).items()],
            partition=PARTITION,
            kept=sum(variant.kept for context in report.contexts for variant in context.variants),
        )
    )


def render_difference_page(difference: Difference) -> str:
    """The page of two reports side by side."""
    return environment().get_template("difference.html").render(difference=difference)


def environment() -> Environment:
    """Templates with the formats of numbers as filters; everything that they insert is escaped."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.tests |= {"unknown": lambda value: value is None or isinstance(value, NotMeasured)}
    env.filters |= {
        "number": formats.number,
        "count": formats.count,
        "megabytes": formats.megabytes,
        "module_name": formats.module_name,
        "percent": formats.percent,
        "milliseconds": formats.milliseconds,
        "plain": formats.plain,
        "shape_name": formats.shape_name,
        "short": formats.short,
        "signed": formats.signed,
        "arrow": formats.arrow,
    }
    env.globals |= {
        "change": formats.change,
        "increase": formats.increase,
        "dense_peer": DENSE_PEER,
        "charts": charts,
        "kind_names": formats.KINDS,
        "layer_errors": layer_errors,
        "worst": worst,
    }
    return env


def key_figures(report: Report) -> list[tuple[str, str, str]]:
    """(what, figure, against what) in a few words each: the key figures of the report."""
    contexts = report.contexts
    ran = [variant for context in contexts for variant in context.variants if variant.status == "ran"]
    figures = []
    if ran:
        passed = sum(variant.parity.verdict == "pass" for variant in ran)
        every = sum(len(context.variants) for context in contexts)
        left = f"; {every - len(ran)} of {every} engines were not run" if every > len(ran) else ""
        figures.append(("Parity", f"{passed} of {len(ran)}", f"engines compute what the eager model computes{left}"))
    if contexts:
        parts = [context.parameters.kept / context.parameters.total for context in contexts]
        total = formats.count(max(context.parameters.total for context in contexts))
        figures.append(("Parameters", _span(parts, formats.percent), f"of {total} kept by a context"))
    for name, pairs in perplexities(contexts).items():
        if len(measured := measured_pairs(pairs)) == len(pairs):
            own, dense = (mean_perplexity(side) for side in zip(*measured.values(), strict=True))
            against = f"mean perplexity of {name}; dense {dense:.2f} ({formats.change(dense, own)})"
            figures.append(("Quality", f"{own:.2f}", against + _like_for_like(report.training)))
            break
    first = [variant.speed.shapes[0] for variant in ran if variant.speed.shapes]
    peers = [shape.peers[DENSE_PEER].ratio for shape in first if DENSE_PEER in shape.peers]
    eagers = [shape.ratio for shape in first if not isinstance(shape.ratio, NotMeasured)]
    spans = [
        (f"{_span(ratios, formats.short)}\N{NO-BREAK SPACE}×", side)
        for ratios, side in ((peers, "the dense model in ONNX Runtime"), (eagers, "eager"))
        if ratios
    ]
    if spans:
        (figure, side), *others = spans
        against = f"as fast as {side} at {formats.shape_name(first[0])}"
        figures.append(("Speed", figure, against + "".join(f"; {span} as fast as {other}" for span, other in others)))
    peaks = [
        (memory.run_peak_rss_bytes, memory.eager_run_peak_rss_bytes)
        for memory in (variant.memory for variant in ran)
        if not isinstance(memory.run_peak_rss_bytes, NotMeasured)
        and not isinstance(memory.eager_run_peak_rss_bytes, NotMeasured)
    ]
    if peaks:
        engine, eager = max(peaks)
        figures.append(("Memory", formats.megabytes(engine), f"peak while running; eager {formats.megabytes(eager)}"))
    bundle = report.bundle
    dense_size = f"; dense model {formats.megabytes(bundle.dense_bytes)}" if bundle.dense_bytes else ""
    figures.append(("Size", formats.megabytes(bundle.bytes), f"all contexts{dense_size}"))
    return figures


def _like_for_like(training: TrainingSummary | None) -> str:
    """What has to be known beside a comparison of a distilled model with its dense baseline."""
    if training is None or not training.distilled or not {PARTITION, DENSE} <= training.controls.keys():
        return ""
    like = training.controls.get(LIKE_FOR_LIKE[DENSE])
    if like is None:
        return ", which is not distilled as the engine's model is"
    own = training.controls[PARTITION].mean_perplexity
    return f"; against the dense model distilled alike {formats.change(like.mean_perplexity, own)} in training"


def unmeasured(report: Report) -> list[tuple[str, list[str], list[str]]]:
    """(reason, fields, engines or parts of the report) of everything that was not measured, each reason once."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}

    def note(reason: str, field: str, where: str) -> None:
        fields, places = found.setdefault(reason, ({}, {}))
        fields[field.replace("_", " ")] = None
        places[where] = None

    for part in ("build", "bundle", "selection"):
        for field, reason in formats.gaps(getattr(report, part)):
            note(reason, field, part)
    for context in report.contexts:
        for variant in context.variants:
            engine = f"{context.name} {variant.name}"
            if variant.status == "ran":
                for each in dataclasses.fields(variant):
                    for field, reason in formats.gaps(getattr(variant, each.name)):
                        note(reason, f"{each.name} {field}", engine)
                for peer in variant.peers:
                    if peer.status != "ran":
                        note(str(peer.reason), f"peer {peer.name}", engine)
            else:
                note(str(variant.reason), f"the whole engine ({variant.status})", engine)
    if report.training is None:
        note("the model records no training results", "controls and swap matrix", "training")
    engines = [f"{context.name} {v.name}" for context in report.contexts for v in context.variants]
    return [
        (reason, list(fields), ["all engines"] if len(engines) > 1 and list(places) == engines else list(places))
        for reason, (fields, places) in found.items()
    ]


def layer_errors(variant: VariantResult) -> tuple[Sequence[LayerError], str]:
    """The errors of single layers, or none and the reason."""
    divergence = variant.divergence
    if divergence is None:
        return (), NO_LAYER_ERRORS
    return divergence.layers or (), divergence.not_measured.get("layers", NO_LAYER_ERRORS)


def worst(errors: Sequence[LayerError]) -> list[LayerError]:
    """The five largest, those that are not finite first."""

    def size(error: LayerError) -> float:
        return math.inf if error.max_abs_error is None else error.max_abs_error

    return sorted(errors, key=size, reverse=True)[:5]


def selection_map(kind: str, layers: Sequence[LayerSelection]) -> SelectionMap:
    """The map that the page draws for the selection of one kind."""
    contexts = list(layers[0].kept) if layers else []
    rows = []
    for layer in layers:
        columns = list(zip(*layer.kept.values(), strict=True))
        runs, first = [], 0
        for keeps, same in groupby(columns):
            length = len(list(same))
            names = [context for context, digit in zip(contexts, keeps, strict=True) if digit == "1"]
            runs.append((first, length, _class(contexts, names), ", ".join(names) or "no context"))
            first += length
        rows.append(LayerMap(name=layer.name, units=len(columns), runs=tuple(runs)))
    used = {run[2] for row in rows for run in row.runs}
    legend = [("all", "all contexts"), *((f"own{i}", f"only {context}") for i, context in enumerate(contexts))]
    legend += [(f"share{i}", f"{10 * i} to {10 * i + 10} % of the contexts") for i in reversed(range(10))]
    legend += [("some", "several contexts"), ("none", "no context")]
    overlap = [[_jaccard([(layer.kept[a], layer.kept[b]) for layer in layers]) for b in contexts] for a in contexts]
    units = max((row.units for row in rows), default=0)
    return SelectionMap(
        kind=kind,
        rows=tuple(rows),
        units=units,
        legend=tuple((name, text) for name, text in legend if name in used),
        contexts=tuple(contexts),
        large=len(contexts) > OWN_COLOURS or units > WIDE_UNITS,
        overlap=overlap,
    )


def _class(contexts: Sequence[str], names: Sequence[str]) -> str:
    if len(names) in (0, len(contexts)):
        return "all" if names else "none"
    if len(contexts) > OWN_COLOURS:
        return f"share{10 * len(names) // len(contexts)}"
    return f"own{contexts.index(names[0])}" if len(names) == 1 else "some"


def _jaccard(pairs: Sequence[tuple[str, str]]) -> float:
    both = sum(x == y == "1" for a, b in pairs for x, y in zip(a, b, strict=True))
    either = sum("1" in (x, y) for a, b in pairs for x, y in zip(a, b, strict=True))
    return both / either if either else 1.0


def _span(values: Sequence[float], form: Any) -> str:
    """The smallest and the largest value, or just one if they look the same."""
    low, high = str(form(min(values))), str(form(max(values)))
    return low if low == high else f"{low.removesuffix(' %')}–{high}"

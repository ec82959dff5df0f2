"""report.html: the report as one page that needs nothing else, on any screen and on paper.

    report -> view (what the template cannot say in a line) -> templates/report.html -> text

Names and reasons come from outside: Jinja2 escapes them all, and the page forbids itself scripts and the network. Bars
and tables are HTML, charts with axes are drawn by `charts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpcompile.report import charts, formats
from cpcompile.report.contents import PARTITION, mean_perplexity, perplexities
from cpcompile.report.difference import Difference

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")
OWN_COLOURS = 7
"""As many contexts get a colour of their own; more than that are told apart by how many keep a unit."""
WIDE_UNITS = 64
"""A map of more units, or of more contexts than have colours, gets the width of the page."""
NO_LAYER_ERRORS = "it was not asked for"


def render_page(report: Mapping[str, Any]) -> str:
    """The page of `report`, which follows the schema."""
    return (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            figures=key_figures(report),
            gaps=unmeasured(report),
            maps=[selection_map(kind, layers) for kind, layers in (report["selection"]["kinds"] or {}).items()],
            partition=PARTITION,
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
        "charts": charts,
        "kind_names": formats.KINDS,
        "layer_errors": layer_errors,
        "worst": worst,
    }
    return env


def key_figures(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, figure, against what) in a few words each: what a reader wants to know first."""
    contexts = report["contexts"]
    ran = [variant for context in contexts for variant in context["variants"] if variant["status"] == "ran"]
    figures = []
    if ran:
        passed = sum(variant["parity"]["verdict"] == "pass" for variant in ran)
        every = sum(len(context["variants"]) for context in contexts)
        left = f"; {every - len(ran)} of {every} engines were not run" if every > len(ran) else ""
        figures.append(("Parity", f"{passed} of {len(ran)}", f"engines compute what the eager model computes{left}"))
    if contexts:
        parts = [context["parameters"]["kept"] / context["parameters"]["total"] for context in contexts]
        total = formats.count(max(context["parameters"]["total"] for context in contexts))
        figures.append(("Parameters", _span(parts, formats.percent), f"of {total} kept by a context"))
    for name, pairs in perplexities(report).items():
        if all(None not in pair for pair in pairs.values()):
            own, dense = (mean_perplexity(side) for side in zip(*pairs.values(), strict=True))
            against = f"mean perplexity of {name}; dense {dense:.2f} ({formats.change(dense, own)})"
            figures.append(("Quality", f"{own:.2f}", against))
            break
    first = [variant["speed"]["shapes"][0] for variant in ran if variant["speed"]["shapes"]]
    ratios = [shape["ratio"] for shape in first if shape["ratio"] is not None]
    if ratios:
        figures.append(
            (
                "Speed",
                f"{_span(ratios, formats.short)}\N{NO-BREAK SPACE}×",
                f"as fast as eager at {formats.shape_name(first[0])}",
            )
        )
    memory = [
        v["memory"]
        for v in ran
        if None not in (v["memory"]["run_peak_rss_bytes"], v["memory"]["eager_run_peak_rss_bytes"])
    ]
    if memory:
        most = max(memory, key=lambda m: int(m["run_peak_rss_bytes"]))
        eager = formats.megabytes(most["eager_run_peak_rss_bytes"])
        figures.append(("Memory", formats.megabytes(most["run_peak_rss_bytes"]), f"peak while running; eager {eager}"))
    bundle = report["bundle"]
    dense_size = "" if bundle["dense_bytes"] is None else f"; dense model {formats.megabytes(bundle['dense_bytes'])}"
    figures.append(("Size", formats.megabytes(bundle["bytes"]), f"all contexts{dense_size}"))
    return figures


def unmeasured(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[str]]]:
    """(reason, fields, engines or parts of the report) of everything that was not measured, each reason once."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}

    def note(reason: str, field: str, where: str) -> None:
        fields, places = found.setdefault(reason, ({}, {}))
        fields[field.replace("_", " ")] = None
        places[where] = None

    for part in ("build", "bundle", "selection"):
        for field, reason in formats.gaps(report[part]):
            note(reason, field, part)
    for context in report["contexts"]:
        for variant in context["variants"]:
            engine = f"{context['name']} {variant['name']}"
            if variant["status"] == "ran":
                for part, content in variant.items():
                    for field, reason in formats.gaps({part: content}):
                        note(reason, f"{part} {field}", engine)
                for peer in variant["peers"]:
                    if peer["status"] != "ran":
                        note(peer["reason"], f"peer {peer['name']}", engine)
            else:
                note(variant["reason"], f"the whole engine ({variant['status']})", engine)
    if report["training"] is None:
        note("the model records no training results", "controls and swap matrix", "training")
    engines = [f"{context['name']} {v['name']}" for context in report["contexts"] for v in context["variants"]]
    return [
        (reason, list(fields), ["all engines"] if len(engines) > 1 and list(places) == engines else list(places))
        for reason, (fields, places) in found.items()
    ]


def layer_errors(variant: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, Any]], str]:
    """The errors of single layers, or none and the reason."""
    divergence = variant["divergence"]
    if divergence is None:
        return (), NO_LAYER_ERRORS
    return divergence["layers"] or (), divergence["not_measured"].get("layers", NO_LAYER_ERRORS)


def worst(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The five largest, those that are not finite first."""

    def size(error: Mapping[str, Any]) -> float:
        return math.inf if error["max_abs_error"] is None else float(error["max_abs_error"])

    return sorted(errors, key=size, reverse=True)[:5]


def selection_map(kind: str, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of runs of units that the same contexts keep, the legend, and the overlap of the contexts.

    A run is (first unit, units, class, its contexts); classes: `all`, `none`, `some`, `own0` … of single contexts, or
    `share0` to `share9`, the part of the contexts in tenths, where there are too many contexts for colours.
    """
    contexts = list(layers[0]["kept"]) if layers else []
    rows = []
    for layer in layers:
        columns = list(zip(*layer["kept"].values(), strict=True))
        runs, first = [], 0
        for keeps, same in groupby(columns):
            length = len(list(same))
            names = [context for context, digit in zip(contexts, keeps, strict=True) if digit == "1"]
            runs.append((first, length, _class(contexts, names), ", ".join(names) or "no context"))
            first += length
        rows.append({"name": layer["name"], "units": len(columns), "runs": runs})
    used = {run[2] for row in rows for run in row["runs"]}
    legend = [("all", "all contexts"), *((f"own{i}", f"only {context}") for i, context in enumerate(contexts))]
    legend += [(f"share{i}", f"{10 * i} to {10 * i + 10} % of the contexts") for i in reversed(range(10))]
    legend += [("some", "several contexts"), ("none", "no context")]
    overlap = [
        [_jaccard([(layer["kept"][a], layer["kept"][b]) for layer in layers]) for b in contexts] for a in contexts
    ]
    return {
        "kind": kind,
        "rows": rows,
        "units": max((row["units"] for row in rows), default=0),
        "legend": [(name, text) for name, text in legend if name in used],
        "contexts": contexts,
        "large": len(contexts) > OWN_COLOURS or max((row["units"] for row in rows), default=0) > WIDE_UNITS,
        "overlap": overlap,
    }


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
    """The least and the largest, or one where they read alike."""
    low, high = str(form(min(values))), str(form(max(values)))
    return low if low == high else f"{low.removesuffix(' %')}–{high}"

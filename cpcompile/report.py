"""report.json: the results in machine-readable form, the verdict, and the tables that a terminal shows.

    ContextResult …, BuildResult -> make_report -> Report (plain containers) -> write_report, render_report

`report.schema.json` beside this file is the contract. A value that was not measured is null and
`not_measured` in the same object says why. The verdict follows from the report alone:

    fail          an engine misses parity; or the mean perplexity over the contexts exceeds the dense
                  baseline's by more than is allowed; or the bundle's shared
                  weights make it larger than the dense model, graphs and tokenizer aside
    inconclusive  something of that could not be measured
    pass          otherwise

Mean perplexities are geometric: exp of the mean loss.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpcompile.files import whole_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Report: TypeAlias = dict[str, Any]
"""The content of report.json."""

SCHEMA_VERSION = 1
SCHEMA = Path(__file__).with_name("report.schema.json")

PARTITION, DENSE = "partition", "dense-baseline"
BRANCH_MEANING: Mapping[str, str] = {
    PARTITION: "the partitioned model",
    DENSE: "the dense parent trained on, ungated, for the same tokens and schedule",
}
DENSE_SIZE_UNKNOWN = "the size of the dense model is unknown"
GRAPH_BYTES = 200_000
"""What an engine may add to the weights: its graph, its part of manifest and tokenizer."""
VERDICT_STYLE = {"pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow"}
NOISE = 0.002
"""Relative difference of perplexities that one seed cannot tell from chance."""


@dataclass(frozen=True, kw_only=True)
class BuildStage:
    """One stage of a build; the peak is that of the process since it began."""

    name: str
    seconds: float
    peak_rss_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a build took; all None where that is not known."""

    seconds: float | None
    peak_rss_bytes: int | None
    stages: tuple[BuildStage, ...] = ()
    not_measured: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ContextResult:
    """One context: its parameters {total, kept, removed, removed_by_kind, removed_experts}, the variants measured."""

    name: str
    parameters: Mapping[str, Any]
    variants: Sequence[DataclassInstance]


def make_report(
    *,
    model: Mapping[str, Any],
    environment: Mapping[str, Any],
    build: BuildResult,
    bundle_bytes: int,
    dense_bytes: int | None,
    shared_weights: bool,
    contexts: Sequence[ContextResult],
    training: Mapping[str, Any] | None,
    max_perplexity_increase: float | None,
) -> Report:
    """The report with its verdict.

    model: {name, architecture, config}. environment: `cpcompile.measure.environment`. training:
    `training_summary`. dense_bytes: weights of the dense model in the bundle's precision. max_perplexity_increase: what
    the verdict allows; None where quality is not measured as perplexity.
    """
    report = {
        "schema_version": SCHEMA_VERSION,
        "model": dict(model),
        "environment": dict(environment),
        "build": _plain(build),
        "bundle": {
            "bytes": bundle_bytes,
            "dense_bytes": dense_bytes,
            "shared_weights": shared_weights,
            "not_measured": {}
            if dense_bytes is not None
            else {"dense_bytes": "the size of the dense model is unknown"},
        },
        "contexts": [
            {
                "name": context.name,
                "parameters": dict(context.parameters),
                "variants": [_plain(variant, without="context") for variant in context.variants],
            }
            for context in contexts
        ],
        "training": dict(training) if training is not None else None,
    }
    verdict, reasons = judge(report, max_perplexity_increase)
    return {"schema_version": SCHEMA_VERSION, "verdict": verdict, "reasons": reasons, **report}


def judge(report: Mapping[str, Any], max_perplexity_increase: float | None) -> tuple[str, list[str]]:
    """The verdict on everything that was measured, and the reasons why it is not a pass."""
    failures: list[str] = []
    gaps: list[str] = []
    for context in report["contexts"]:
        ran = [variant for variant in context["variants"] if variant["status"] == "ran"]
        if not ran:
            gaps.append(f"{context['name']}: no engine of this context ran")
        for variant in ran:
            parity = variant["parity"]
            if parity["verdict"] != "pass":
                sentence = f"{context['name']} {variant['name']}: parity {parity['verdict']}: {parity['reason']}"
                (failures if parity["verdict"] == "fail" else gaps).append(sentence)
    if not report["contexts"]:
        gaps.append("the bundle has no contexts")
    for name, pairs in _perplexities(report).items():
        if max_perplexity_increase is None:
            break
        missing = sorted(context for context, pair in pairs.items() if None in pair)
        if missing:
            gaps.append(f"{name}: no perplexity of engine or dense baseline for {', '.join(missing)}")
            continue
        mean, dense = mean_perplexity([p for p, _ in pairs.values()]), mean_perplexity([d for _, d in pairs.values()])
        if mean > (1 + max_perplexity_increase) * dense:
            failures.append(
                f"{name}: mean perplexity {mean:.4g} is {mean / dense - 1:.1%} above the dense baseline's {dense:.4g}; "
                f"{max_perplexity_increase:.1%} are allowed: train longer, or with larger budgets"
            )
    size, dense_size = report["bundle"]["bytes"], report["bundle"]["dense_bytes"]
    engines = sum(len(context["variants"]) for context in report["contexts"])
    if dense_size is None:
        gaps.append(f"bundle: {report['bundle']['not_measured']['dense_bytes']}")
    elif report["bundle"]["shared_weights"] and size > dense_size + engines * GRAPH_BYTES:
        failures.append(f"bundle: {size:,} bytes are more than the dense model's {dense_size:,}")
    verdict = "fail" if failures else "inconclusive" if gaps else "pass"
    return verdict, failures + gaps


def mean_perplexity(perplexities: Sequence[float]) -> float:
    """Geometric mean: exp of the mean loss."""
    return math.exp(sum(math.log(value) for value in perplexities) / len(perplexities))


def training_summary(training: Mapping[str, Any], contexts: Sequence[str]) -> dict[str, Any] | None:
    """The branches of a training run side by side, and what that says; None if the checkpoint records none.

    training: the metadata of a checkpoint, with `perplexity` and optionally `controls` and `swap_matrix`.
    """
    if "perplexity" not in training:
        return None
    branches = {
        name: {"description": BRANCH_MEANING.get(name, name), "perplexity": perplexity}
        for name, perplexity in training["perplexity"].items()
    } | dict(training.get("controls", {}))
    controls = {}
    for name, branch in branches.items():
        perplexity = {context: branch["perplexity"][context] for context in contexts}
        controls[name] = {
            "description": branch["description"],
            "perplexity": perplexity,
            "mean_perplexity": mean_perplexity(list(perplexity.values())),
        }
    swap = training.get("swap_matrix")
    matrix = (
        {"contexts": list(swap["contexts"]), "perplexity": [list(row) for row in swap["perplexity"]]} if swap else None
    )
    findings = [*_branch_findings(controls), *(_swap_findings(matrix) if matrix else ())]
    return {"controls": controls, "swap_matrix": matrix, "findings": findings}


def write_report(report: Report, folder: Path) -> Path:
    """Write `folder`/report.json in one step: a reader sees the old report or the new one."""
    path = folder / "report.json"
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def build_of(folder: Path) -> BuildResult:
    """What the report in the bundle `folder` says of its build; nulls with the reason if there is none to be read."""
    try:
        build = json.loads((folder / "report.json").read_text(encoding="utf-8"))["build"]
        return BuildResult(
            seconds=float(build["seconds"]),
            peak_rss_bytes=int(build["peak_rss_bytes"]),
            stages=tuple(
                BuildStage(name=str(s["name"]), seconds=float(s["seconds"]), peak_rss_bytes=int(s["peak_rss_bytes"]))
                for s in build["stages"]
            ),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        unknown = "the bundle was validated, and has no report of its build"
        return BuildResult(
            seconds=None, peak_rss_bytes=None, not_measured=dict.fromkeys(("seconds", "peak_rss_bytes"), unknown)
        )


def render_report(report: Mapping[str, Any]) -> RenderableType:
    """The whole report for a terminal."""
    parts: list[RenderableType] = [contexts_table(report)]
    if report["training"] is not None:
        parts.append(controls_table(report["training"]))
    return Group(*parts, footnotes(report), verdict_text(report))


def contexts_table(report: Mapping[str, Any]) -> Table:
    """A row per engine: what it keeps and weighs, and engine against eager model."""
    title = Text(f"{report['model']['name']}: engine against eager model")
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0), pad_edge=False)
    for column in (
        "context",
        "parameters",
        "size",
        "parity\nerror",
        "perplexity",
        "run\nmemory",
        "times as fast\nas eager",
    ):
        table.add_column(column, justify="left" if column == "context" else "right")
    for context in report["contexts"]:
        for variant in context["variants"]:
            cells = [
                f"{context['name']}\n{variant['name']}",
                _parameters_cell(context["parameters"]),
                _bytes(variant["bytes"]),
                *(_measured_cells(variant) if variant["status"] == "ran" else [variant["status"], "–", "–", "–"]),
            ]
            table.add_row(*(Text(cell) for cell in cells))
    return table


def controls_table(training: Mapping[str, Any] | None) -> RenderableType:
    """The trained branches from best to worst mean perplexity, and the findings below."""
    if training is None:
        return Text("this checkpoint records no training results", style="dim")
    controls = training["controls"]
    table = Table(title="held-out perplexity")
    table.add_column("branch")
    table.add_column("mean", justify="right")
    for context in next(iter(controls.values()))["perplexity"]:
        table.add_column(Text(context), justify="right")
    for name, branch in sorted(controls.items(), key=lambda item: float(item[1]["mean_perplexity"])):
        values = (branch["mean_perplexity"], *branch["perplexity"].values())
        table.add_row(
            Text(name), *(Text(f"{value:.2f}") for value in values), style="bold" if name == PARTITION else None
        )
    return Group(table, *(Text(f"• {finding}") for finding in training["findings"]))


def render_optimization(result: Mapping[str, Any], *, explain: bool) -> Group:
    """What `cpcompile opt` did: size after every pass, outputs compared, zero channels that stayed."""
    table = Table(box=box.SIMPLE)
    for column in ("pass", "nodes", "parameters", "bytes", "seconds"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    rows = [("(before)", result["before"], None), *((s["name"], s["size"], s["seconds"]) for s in result["steps"])]
    for name, size, seconds in rows:
        cells = (str(size["nodes"]), f"{size['parameters']:,}", f"{size['bytes']:,}", _number(seconds, ".2f"))
        table.add_row(Text(name), *cells)
    parts: list[RenderableType] = [table]
    if explain and not result["blocked"]:
        parts.append(Text("no zero channel had to stay"))
    elif explain:
        stayed = Table("tensor", "axis", "zero channels", "kept by", "because", box=box.SIMPLE)
        for b in result["blocked"]:
            keeper = f"{b['operator']} {b['node']}".strip()
            stayed.add_row(*(Text(str(cell)) for cell in (b["value"], b["axis"], b["channels"], keeper, b["reason"])))
        parts.append(stayed)
    if (comparison := result["comparison"]) is not None:
        parts.append(_comparison_text(comparison))
    return Group(*parts)


def _comparison_text(comparison: Mapping[str, Any]) -> Text:
    lines = []
    for out in comparison["outputs"]:
        error, tolerance = (_number(out[key], ".2g") for key in ("max_abs_error", "tolerance"))
        lines.append(f"{out['name']}: max abs difference {error} of {tolerance}")
    if comparison["runs"]:
        lines.append(f"tolerance: {comparison['tolerance_source']}; {comparison['runs']} inputs")
    text = Text("\n".join([*lines, ""]))
    text.append(f"check: {comparison['verdict']}", style=VERDICT_STYLE[comparison["verdict"]])
    return text.append(f": {comparison['reason']}" if comparison["reason"] else "")


def footnotes(report: Mapping[str, Any]) -> Text:
    """Why there are gaps in the table: each reason once, with the engines or the fields that it concerns."""
    concerned: dict[str, list[str]] = {}
    for context in report["contexts"]:
        for variant in context["variants"]:
            if variant["status"] == "ran":
                gaps = [(key, reason) for key, reason in _reasons(variant)]
            else:
                gaps = [(f"{context['name']} {variant['name']}", variant["reason"])]
            for what, reason in gaps:
                whats = concerned.setdefault(reason, [])
                if what not in whats:
                    whats.append(what)
    lines = (f"– {', '.join(whats)}: {reason}" for reason, whats in concerned.items())
    return Text("\n".join(lines), style="dim")


def verdict_text(report: Mapping[str, Any]) -> Text:
    """Build, bundle and verdict in a few lines."""
    build, bundle = report["build"], report["bundle"]
    text = Text()
    if build["seconds"] is not None:
        text.append(f"built in {build['seconds']:.1f} s, peak {_bytes(build['peak_rss_bytes'])}; ")
    text.append(f"bundle {_bytes(bundle['bytes'])}, dense model {_bytes(bundle['dense_bytes'])}\n")
    text.append(f"verdict: {report['verdict']}", style=VERDICT_STYLE[report["verdict"]])
    for reason in report["reasons"]:
        text.append(f"\n• {reason}")
    return text


def _plain(result: DataclassInstance, *, without: str | None = None) -> dict[str, Any]:
    """Plain containers, tuples as lists, exactly as they come back from the file."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(result)))
    return {key: value for key, value in plain.items() if key != without}


def _perplexities(report: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """(engine, dense) perplexity by variant and context, of all engines that ran."""
    pairs: dict[str, dict[str, tuple[float, float]]] = {}
    for context in report["contexts"]:
        for variant in context["variants"]:
            if variant["status"] == "ran":
                quality = variant["quality"]
                pair = (quality["perplexity"], quality["dense_perplexity"])
                pairs.setdefault(variant["name"], {})[context["name"]] = pair
    return pairs


def _branch_findings(controls: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The partitioned model against every other branch, and which branch is best."""
    if PARTITION not in controls:
        return
    own = controls[PARTITION]["mean_perplexity"]
    for name, branch in controls.items():
        if name == PARTITION:
            continue
        other = branch["mean_perplexity"]
        difference = own / other - 1
        verb = "cannot be told apart from" if abs(difference) < NOISE else "beats" if difference < 0 else "loses to"
        yield (
            f"The partitioned model {verb} {name} ({branch['description']}): "
            f"mean perplexity {own:.4g} against {other:.4g} ({difference:+.1%})."
        )
    best = min(controls, key=lambda name: float(controls[name]["mean_perplexity"]))
    yield f"The lowest mean perplexity is that of {best}: {controls[best]['mean_perplexity']:.4g}."


def _swap_findings(matrix: Mapping[str, Any]) -> Iterator[str]:
    """Whether each context does best with the units that were chosen for it."""
    contexts, at_home = matrix["contexts"], True
    for index, (context, row) in enumerate(zip(contexts, matrix["perplexity"], strict=True)):
        best = row.index(min(row))
        if row[best] < row[index]:
            at_home = False
            yield (
                f"Text of {context} does better with the units of {contexts[best]} ({row[best]:.4g}) "
                f"than with its own ({row[index]:.4g})."
            )
    if at_home:
        yield "Every context does best with its own units: the smallest perplexity of each swap row is on the diagonal."


def _measured_cells(variant: Mapping[str, Any]) -> list[str]:
    """Parity, perplexity, memory and speed of an engine that ran."""
    parity, quality, memory = variant["parity"], variant["quality"], variant["memory"]
    shapes = variant["speed"]["shapes"]
    error, tolerance = _number(parity["max_abs_error_float64"], ".2g"), _number(parity["tolerance"], ".2g")
    return [
        f"{error}\nof {tolerance}\n{parity['verdict']}",
        f"{_number(quality['perplexity'], '.2f')}\ndense {_number(quality['dense_perplexity'], '.2f')}",
        f"{_bytes(memory['run_peak_rss_bytes'])}\neager {_bytes(memory['eager_run_peak_rss_bytes'])}",
        "\n".join(map(_speed_line, shapes)) if shapes is not None else "–",
    ]


def _speed_line(shape: Mapping[str, Any]) -> str:
    where = f"{shape['batch']}×{shape['sequence']}" if shape["sequence"] else f"batch {shape['batch']}"
    if shape["ratio"] is None:
        return f"{where}: {shape['p50_ms']:.2f} ms"
    return f"{where}: {shape['ratio']:.2f} ({shape['ratio_low']:.2f}–{shape['ratio_high']:.2f})"


def _parameters_cell(parameters: Mapping[str, Any]) -> str:
    kept, total = parameters["kept"], parameters["total"]
    return f"{_count(kept)}\nof {_count(total)}\n{kept / total:.0%}"


def _reasons(node: Any) -> Iterator[tuple[str, str]]:
    """(field, reason) of everything below `node` that was not measured."""
    if isinstance(node, list):
        for item in node:
            yield from _reasons(item)
    elif isinstance(node, dict):
        yield from node.get("not_measured", {}).items()
        for value in node.values():
            yield from _reasons(value)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _count(value: int) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.1f} k"


def _bytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.1f} MB"

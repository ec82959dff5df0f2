"""What report.json holds, and the verdict.

`report.schema.json` beside this file is the contract. A value that was not measured is null and
`not_measured` in the same object says why. The verdict follows from the report alone:

    fail          an engine misses parity, is slower than was demanded, or has nodes that fell back to
                  another provider; or the mean perplexity over the contexts exceeds the dense
                  baseline's by more than is allowed; or the bundle's shared
                  weights make it larger than the dense model, graphs, tokenizer and plans of TensorRT aside
    inconclusive  something of that could not be measured; an engine that was built and not run here is not judged,
                  and a context of which no engine ran is inconclusive
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

from cpcompile.files.whole_files import read_text
from cpcompile.targets.requests import FLAVOURS

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
NOISE = 0.002
"""Relative difference of perplexities that one seed cannot tell from chance."""


@dataclass(frozen=True, kw_only=True)
class BuildStage:
    """One stage of a build; the peak of resident bytes is since the build began, that of private ones the stage's."""

    name: str
    seconds: float
    peak_rss_bytes: int | None = None
    peak_private_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a build took; all None where that is not known."""

    seconds: float | None
    peak_rss_bytes: int | None
    peak_private_bytes: int | None
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
    selection: Mapping[str, Sequence[Mapping[str, Any]]] | str,
    training: Mapping[str, Any] | None,
    max_perplexity_increase: float | None,
) -> Report:
    """The report with its verdict.

    model: {name, architecture, config}. environment: `cpcompile.machine.environment`. dense_bytes: weights of the
    dense model in the bundle's precision. selection: which units each context keeps
    (`cpcompile.core.selection.Digits`), or why that is unknown; contexts without a place in the report are left out.
    training: `training_summary`. max_perplexity_increase: what the verdict allows; None where quality is not
    measured as perplexity.
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
            "not_measured": {} if dense_bytes is not None else {"dense_bytes": DENSE_SIZE_UNKNOWN},
        },
        "contexts": [
            {
                "name": context.name,
                "parameters": dict(context.parameters),
                "variants": [_plain(variant, without="context") for variant in context.variants],
            }
            for context in contexts
        ],
        "selection": _selection(selection, [context.name for context in contexts]),
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
                sentence += _divergence_sentence(variant["divergence"])
                (failures if parity["verdict"] == "fail" else gaps).append(sentence)
            for what in ("speed", "placement"):
                if (verdict := variant[what]["verdict"]) in ("fail", "inconclusive"):
                    sentence = f"{context['name']} {variant['name']}: {what}: {variant[what]['reason']}"
                    (failures if verdict == "fail" else gaps).append(sentence)
    if not report["contexts"]:
        gaps.append("the bundle has no contexts")
    for name, pairs in perplexities(report).items():
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
    # Plans, and engines of other precisions, have weights of their own.
    variants = [variant for context in report["contexts"] for variant in context["variants"]]
    own = [v["bytes"] or 0 for v in variants if v["runtime"] in FLAVOURS or v["precision"] != "fp32"]
    size, dense_size = report["bundle"]["bytes"] - sum(own), report["bundle"]["dense_bytes"]
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


def perplexities(report: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """(engine, dense) perplexity by variant and context, of all engines that ran."""
    pairs: dict[str, dict[str, tuple[float, float]]] = {}
    for context in report["contexts"]:
        for variant in context["variants"]:
            if variant["status"] == "ran":
                quality = variant["quality"]
                pair = (quality["perplexity"], quality["dense_perplexity"])
                pairs.setdefault(variant["name"], {})[context["name"]] = pair
    return pairs


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


def build_of(folder: Path) -> BuildResult:
    """What the report in the bundle `folder` says of its build; nulls with the reason if there is none to be read."""
    try:
        build = json.loads(read_text(folder / "report.json"))["build"]
        return BuildResult(
            seconds=float(build["seconds"]),
            peak_rss_bytes=int(build["peak_rss_bytes"]),
            peak_private_bytes=_known(build["peak_private_bytes"]),
            stages=tuple(
                BuildStage(
                    name=str(stage["name"]),
                    seconds=float(stage["seconds"]),
                    peak_rss_bytes=int(stage["peak_rss_bytes"]),
                    peak_private_bytes=_known(stage["peak_private_bytes"]),
                )
                for stage in build["stages"]
            ),
            not_measured={str(name): str(reason) for name, reason in build["not_measured"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        unknown = "the bundle was validated, and has no report of its build"
        names = ("seconds", "peak_rss_bytes", "peak_private_bytes")
        return BuildResult(
            seconds=None,
            peak_rss_bytes=None,
            peak_private_bytes=None,
            not_measured=dict.fromkeys(names, unknown),
        )


def _selection(selection: Mapping[str, Sequence[Mapping[str, Any]]] | str, contexts: Sequence[str]) -> dict[str, Any]:
    if isinstance(selection, str):
        return {"kinds": None, "not_measured": {"kinds": selection}}
    kinds = {
        kind: [{"name": layer["name"], "kept": {c: layer["kept"][c] for c in contexts}} for layer in layers]
        for kind, layers in selection.items()
    }
    return {"kinds": kinds, "not_measured": {}}


def _known(value: Any) -> int | None:
    return None if value is None else int(value)


def _plain(result: DataclassInstance, *, without: str | None = None) -> dict[str, Any]:
    """Plain containers, tuples as lists, exactly as they come back from the file."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(result)))
    return {key: value for key, value in plain.items() if key != without}


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


def _divergence_sentence(divergence: Mapping[str, Any] | None) -> str:
    """Where the engine leaves the path, if that was found."""
    if divergence is None or divergence["sentence"] is None:
        return ""
    return f"; {divergence['sentence']}" + (f"; repro in {divergence['repro']}" if divergence["repro"] else "")

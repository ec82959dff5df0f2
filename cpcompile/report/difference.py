"""What changed between two reports, and which changes exceed the noise.

    before, after -> compare_reports -> Difference -> rows for a terminal, a page or JSON

A change of a number exceeds the measured noise if

    ratio              the 95 % intervals of both reports do not overlap
    parity errors      it is larger than the tolerance of parity
    perplexity         it is larger than 0.2 %, the noise of a single seed
    coherence          it is larger than twice its standard error
    counts and sizes   they differ at all: they have no noise

The noise of other numbers (times, memory, accuracy) was not measured, and none is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cpcompile.core.json_form import to_json
from cpcompile.report.contents import Report
from cpcompile.report.training_summary import NOISE

EXACT = ("parameters", "placement", "bundle")
"""Parts of a report whose numbers have no noise."""
WHOLE = "whole bundle"
"""Name of the part with the numbers that belong to no context."""
PARITY_ERRORS = ("max_abs_error", "max_abs_error_float64", "eager_float32_error")
SKIPPED = (
    "nodes",
    "quantiles_ms",
    "eager_quantiles_ms",
    "not_measured",
    "divergence",
    "removed_experts",
    "coherence_error",
    "dense_coherence_error",
    "coherence_difference_error",
)
"""Lists and texts, which are not single numbers, and the errors of other numbers."""


Keys = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A number that differs between the reports."""

    name: str
    before: float
    after: float
    relative: float | None
    """The change as a part of `before`; None where that is 0."""
    beyond_noise: bool | None
    """Whether the change exceeds the noise; None where no noise was measured."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The numbers of one engine, or of the whole report."""

    name: str
    verdicts: tuple[str, str] | None
    """Verdicts on the parity of an engine, before and after."""
    changes: tuple[Change, ...]
    """Changes of the numbers that both reports have."""
    equal: int
    """How many numbers are the same."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two reports side by side."""

    names: tuple[str, str]
    verdicts: tuple[str, str]
    reasons: tuple[tuple[str, ...], tuple[str, ...]]
    appeared: tuple[str, ...]
    """Contexts, engines and numbers that only the second report has."""
    disappeared: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def beyond_noise(self) -> int:
        """How many changes exceed the noise."""
        return sum(change.beyond_noise is True for part in self.parts for change in part.changes)

    @property
    def summary(self) -> str:
        """The number of changes beyond noise, in a sentence."""
        count = self.beyond_noise
        return f"{count or 'No'} number{'s exceed' if count > 1 else ' exceeds'} the measured noise."


def compare_reports(before: Report, after: Report, names: tuple[str, str]) -> Difference:
    """Compare every number of `before` and `after`; names: what to call the two."""
    olds, news = _parts(to_json(before)), _parts(to_json(after))
    appeared = [name for name in news if name not in olds]
    disappeared = [name for name in olds if name not in news]
    parts = []
    for name in (name for name in olds if name in news):
        old, new = dict(_numbers(olds[name])), dict(_numbers(news[name]))
        appeared += [f"{name}: {_words(path)}" for path in new if path not in old]
        disappeared += [f"{name}: {_words(path)}" for path in old if path not in new]
        changes = [
            Change(
                name=_words(path),
                before=old[path],
                after=new[path],
                relative=new[path] / old[path] - 1 if old[path] else None,
                beyond_noise=_beyond_noise(path, olds[name], news[name]),
            )
            for path in old
            if path in new and old[path] != new[path]
        ]
        equal = sum(new.get(path) == value for path, value in old.items())
        parity = [side["parity"]["verdict"] for side in (olds[name], news[name]) if "parity" in side]
        verdicts = (parity[0], parity[1]) if parity else None
        parts.append(Part(name=name, verdicts=verdicts, changes=tuple(changes), equal=equal))
    return Difference(
        names=names,
        verdicts=(before.verdict, after.verdict),
        reasons=(before.reasons, after.reasons),
        appeared=tuple(appeared),
        disappeared=tuple(disappeared),
        parts=tuple(parts),
    )


def _parts(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The whole, every context and every engine: name -> content."""
    training = report["training"] or {}
    stages = {stage["name"]: stage for stage in report["build"]["stages"]}
    means = {
        name: {"mean_perplexity": branch["mean_perplexity"]} for name, branch in training.get("controls", {}).items()
    }
    whole = {"build": {**report["build"], "stages": stages}, "bundle": report["bundle"], "training": means}
    parts: dict[str, Mapping[str, Any]] = {WHOLE: whole}
    for context in report["contexts"]:
        parts[context["name"]] = {"parameters": context["parameters"]}
        for variant in context["variants"]:
            speed = variant["speed"]
            shapes = {f"{s['batch']}x{s['sequence'] or '-'}": s for s in speed["shapes"] or ()}
            parts[f"{context['name']} {variant['name']}"] = {
                **variant,
                "speed": {"threads": speed["threads"], **shapes},
            }
    return parts


def _numbers(node: Any, path: Keys = ()) -> Iterator[tuple[Keys, float]]:
    """(path, value) of every number below `node`."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key not in SKIPPED:
                yield from _numbers(value, (*path, key))
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path, node


def _beyond_noise(path: Keys, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool | None:
    name, old, new = path[-1], _at(before, path[:-1]), _at(after, path[:-1])
    if name.startswith("ratio"):
        bounds = [side[bound] for side in (old, new) for bound in ("ratio_low", "ratio_high")]
        return None if None in bounds else bool(bounds[1] < bounds[2] or bounds[3] < bounds[0])
    if name in PARITY_ERRORS:
        tolerances = [side["tolerance"] for side in (old, new) if side["tolerance"] is not None]
        return bool(abs(new[name] - old[name]) > max(tolerances)) if tolerances else None
    if name.endswith("perplexity"):
        return bool(abs(new[name] / old[name] - 1) > NOISE)
    if name.endswith("coherence"):
        errors = [side[f"{name}_error"] for side in (old, new)]
        return None if None in errors else bool(abs(new[name] - old[name]) > 2 * math.hypot(*errors))
    return True if path[0] in EXACT or path == ("bytes",) else None


def _at(node: Any, path: Keys) -> Any:
    for step in path:
        node = node[step]
    return node


def _words(path: Keys) -> str:
    return " ".join(path).replace("_", " ")

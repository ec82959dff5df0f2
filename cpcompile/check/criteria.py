"""Snapshot x baseline x limits -> outcomes, one per criterion and place.

    present     the bundle has the engine that the baseline has
    parity      the engine is the masked eager model of its context; placement: every node ran where it should
    the others  change = now / baseline - 1 (accuracy: now - baseline), against the limit of its criterion

A noisy value is an interval, and so is its change: with r = now / baseline, both with intervals, the bounds are

    r * exp(-+ sqrt(ln(now / now_bound)^2 + ln(baseline / baseline_bound)^2))

(Zou and Donner, 2008: limits recovered from those of each side). Wholly within the limit is a pass, wholly beyond a
fail, across it inconclusive; and beyond it is inconclusive as well while something else kept the machine busy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from cpcompile.check.baseline import Measured, Place, Snapshot, Value, criterion_of
from cpcompile.core.check_config import CheckConfig, MaxIncrease
from cpcompile.core.errors import printable

Verdict: TypeAlias = Literal["pass", "fail", "inconclusive", "not measured", "skipped", "new"]
"""not measured: the baseline has the value, but it could not be measured now; skipped: on request, or because the
baseline has no parity of the engine either."""
UNDECIDED = frozenset({"inconclusive", "not measured"})
SCHEMA_VERSION = 1
ROUNDING = 1e-9
"""Slack for the binary rounding of limits and changes."""
WIDEST = 700.0
"""Largest half-width of an interval, as a logarithm, whose exponential a float can hold."""


@dataclass(frozen=True)
class Criterion:
    """A compared quantity. `limit` names its setting in `CheckConfig`; None if there is nothing to set."""

    meaning: str
    limit: str | None = None
    unit: Literal["", "bytes", "times", "%"] = ""
    needs_model: bool = False


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "present": Criterion("the bundle has the engine of the baseline"),
        "parity": Criterion("the engine computes what the eager model of its context computes", needs_model=True),
        "parity_error": Criterion("error against the eager model, in tolerances", "parity_error", needs_model=True),
        "perplexity": Criterion("perplexity on held-out text", "perplexity", needs_model=True),
        "accuracy": Criterion("next-token accuracy on held-out text", "accuracy", "%", needs_model=True),
        "bundle_bytes": Criterion("size of the bundle", "bundle_bytes", "bytes"),
        "bytes": Criterion("size of the engine", "bytes", "bytes"),
        "parameters": Criterion("parameters kept", "parameters"),
        "nodes": Criterion("nodes that ran", "nodes"),
        "placement": Criterion("every node ran on the provider and in the precision of the baseline"),
        "memory": Criterion("peak resident memory while running", "memory", "bytes", needs_model=True),
        "private_memory": Criterion("peak private memory while running", "memory", "bytes", needs_model=True),
        "speed_ratio": Criterion("times as fast as the dense model", "speed_ratio", "times", needs_model=True),
    }
)
NEEDS_MODEL = tuple(name for name, criterion in CRITERIA.items() if criterion.needs_model)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One criterion at one place."""

    name: str
    """Name of the criterion, followed by the shape if there are several."""
    context: str | None
    variant: str | None
    verdict: Verdict
    baseline: float | str | None = None
    now: float | str | None = None
    change: float | None = None
    """now / baseline - 1, for accuracy now - baseline; None if that is not a number."""
    change_low: float | None = None
    change_high: float | None = None
    allowed: float | None = None
    """The allowed change, with its sign."""
    reason: str | None = None
    """Why it is neither a pass nor a plain miss of the limit."""

    @property
    def criterion(self) -> str:
        return criterion_of(self.name)

    @property
    def place(self) -> str:
        """`english cpu-fp32`; `bundle` for the whole bundle."""
        return " ".join(part for part in (self.context, self.variant) if part) or "bundle"

    @property
    def sentence(self) -> str:
        """The finding, in one line."""
        if self.baseline is None and self.now is None:
            return self.reason or CRITERIA[self.criterion].meaning
        unit = CRITERIA[self.criterion].unit
        if self.now is None:
            return f"{self.reason} ({show(self.baseline, unit)} in the baseline)"
        text = f"{show(self.now, unit)}, {show(self.baseline, unit) or 'nothing'} in the baseline"
        if self.change is not None and self.allowed is not None:
            text += f", {show_change(self)}, allowed {percent(self.allowed)}"
        return f"{text}: {self.reason}" if self.reason else text


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of a check; true if it passes."""

    subject: str
    """Path of the bundle or file that was checked."""
    baseline: str
    """Path of the baseline."""
    environment: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.verdict == "pass"

    @property
    def verdict(self) -> Literal["pass", "fail", "inconclusive"]:
        verdicts = {outcome.verdict for outcome in self.outcomes}
        return "fail" if "fail" in verdicts else "inconclusive" if verdicts & UNDECIDED else "pass"

    def plain(self) -> dict[str, Any]:
        """As `check.schema.json` describes it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "subject": self.subject,
            "baseline": self.baseline,
            "environment": dict(self.environment),
            "notes": list(self.notes),
            "outcomes": [{**dataclasses.asdict(outcome), "sentence": outcome.sentence} for outcome in self.outcomes],
        }


def judge(before: Snapshot, now: Snapshot, config: CheckConfig, *, waived: Container[str] = ()) -> tuple[Outcome, ...]:
    """Judge everything in `now` against the baseline `before`.

    waived: criteria that may stay unmeasured.
    """
    outcomes: list[Outcome] = []
    for place in dict.fromkeys((*before.places, *now.places)):
        outcomes += _judge_place(place, before.places.get(place), now.places.get(place), config, waived)
    return tuple(dataclasses.replace(each, reason=each.reason and printable(each.reason)) for each in outcomes)


def differences(before: Snapshot, now: Snapshot) -> tuple[str, ...]:
    """Other differences, which may explain an outcome."""
    notes = []
    for what, old, new in (
        ("the model's setting", before.config, now.config),
        ("the environment's", before.environment, now.environment),
        ("the version of", before.environment.get("versions", {}), now.environment.get("versions", {})),
    ):
        for key in dict.fromkeys((*old, *new)):
            if old.get(key) != new.get(key) and not isinstance(new.get(key), Mapping):
                notes.append(f"{what} {key}: {new.get(key)}, in the baseline {old.get(key)}")
    return tuple(map(printable, notes))


def doubtful(outcomes: tuple[Outcome, ...], criteria: Container[str]) -> dict[Place, set[str]]:
    """Those of `criteria` that missed their limit or are undecided, by place: worth measuring again."""
    found: dict[Place, set[str]] = {}
    for outcome in outcomes:
        if outcome.criterion in criteria and outcome.verdict in ("fail", "inconclusive"):
            found.setdefault((outcome.context or "", outcome.variant or ""), set()).add(outcome.criterion)
    return found


def expected(before: Snapshot) -> Iterator[tuple[Place, str]]:
    """The place and the name of every outcome that a check against `before` can have, except new ones."""
    for place, measured in before.places.items():
        if place[1]:
            yield place, "present"
        for name in (*measured.verdicts, *measured.values):
            yield place, name


def left_out(snapshot: Snapshot) -> dict[str, str]:
    """Criteria missing from a baseline of `snapshot`, and why: no check will judge them."""
    held = {criterion_of(name) for each in snapshot.places.values() for name in (*each.values, *each.verdicts)}
    reasons: dict[str, str] = {}
    for each in snapshot.places.values():
        for name, why in each.not_measured.items():
            reasons.setdefault(criterion_of(name), why)
    return {name: why for name, why in reasons.items() if name in CRITERIA and name not in held}


def show(value: float | str | None, unit: str) -> str:
    """A value for people; "" where there is none."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if unit == "%":
        return f"{value:.2%}"
    if unit == "times":
        return f"{value:.3g} ×"
    if unit == "bytes":
        return f"{value / 1e6:,.3f} MB"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.5g}"


def show_change(outcome: Outcome) -> str:
    """+1.2 %, with its interval if it has one."""
    if outcome.change is None:
        return ""
    text = percent(outcome.change)
    if outcome.change_low != outcome.change_high and outcome.change_low is not None and outcome.change_high is not None:
        text += f" ({percent(outcome.change_low)} … {percent(outcome.change_high)})"
    return text


def percent(part: float) -> str:
    """A change, with its sign."""
    return f"{part * 100:+.3g} %" if part else "0 %"


def _judge_place(
    place: Place, before: Measured | None, now: Measured | None, config: CheckConfig, waived: Container[str]
) -> Iterator[Outcome]:
    outcome = partial(Outcome, context=place[0] or None, variant=place[1] or None)
    if now is None:
        if place[1]:
            yield outcome(name="present", verdict="fail", reason="the baseline has this engine, the bundle has not")
        return
    if place[1] and before is None:
        reason = "the baseline does not have this engine; --update-baseline takes it in"
        yield outcome(name="present", verdict="new", reason=reason)
    elif place[1]:
        yield outcome(name="present", verdict="pass")
    before = before or Measured()
    for name in dict.fromkeys((*before.verdicts, *now.verdicts)):
        old = before.verdicts[name][0] if name in before.verdicts else None
        if name in now.verdicts:
            verdict, why = now.verdicts[name]
            if name == "placement" and verdict == "pass" and (why := _placed_elsewhere(before, now)):
                verdict = "fail"
            yield outcome(name=name, verdict=verdict, baseline=old, now=verdict, reason=why)
        else:
            yield _unmeasured(outcome, name, old, now, waived)
    if (
        "parity" in now.not_measured and "parity" not in before.verdicts
    ):  # missing as in the baseline, but still not a pass
        yield outcome(name="parity", verdict="skipped", reason=now.not_measured["parity"])
    for name in dict.fromkeys((*before.values, *now.values)):
        if criterion_of(name) not in CRITERIA:
            continue  # of another version
        if name not in now.values:
            yield _unmeasured(outcome, name, before.values[name].value, now, waived)
        elif name not in before.values:
            reason = "the baseline does not have it; --update-baseline takes it in"
            yield outcome(name=name, verdict="new", now=now.values[name].value, reason=reason)
        else:
            judged = _judge_value(outcome, name, before.values[name], now.values[name], config)
            operators = _more_operators(before, now) if name == "nodes" and judged.verdict == "fail" else None
            yield dataclasses.replace(judged, reason=operators) if operators else judged


def _unmeasured(
    outcome: Callable[..., Outcome], name: str, old: float | str | None, now: Measured, waived: Container[str]
) -> Outcome:
    criterion = criterion_of(name)
    reason = now.not_measured.get(name) or now.not_measured.get(criterion) or "it is not in the report"
    return outcome(name=name, verdict="skipped" if criterion in waived else "not measured", baseline=old, reason=reason)


def _judge_value(outcome: Callable[..., Outcome], name: str, before: Value, now: Value, config: CheckConfig) -> Outcome:
    criterion = CRITERIA[criterion_of(name)]
    assert criterion.limit is not None
    limit = getattr(config, criterion.limit)
    rises = isinstance(limit, MaxIncrease)
    allowed = limit.max_increase if rises else -limit.max_decrease
    change, low, high = _difference(before, now) if criterion.unit == "%" else _quotient(before, now)
    least, most = (low - allowed, high - allowed) if rises else (allowed - high, allowed - low)
    verdict: Verdict = "pass" if most <= ROUNDING else "fail" if least > ROUNDING else "inconclusive"
    reason = None
    if verdict == "inconclusive":
        reason = "the interval is too wide to decide" + (f" ({now.interference})" if now.interference else "")
    elif verdict == "fail" and criterion.limit == "speed_ratio" and now.interference:
        verdict, reason = "inconclusive", f"beyond the limit, but while {now.interference}"
    finite = all(map(math.isfinite, (change, low, high)))
    return outcome(
        name=name,
        verdict=verdict,
        baseline=before.value,
        now=now.value,
        change=change if finite else None,
        change_low=low if finite else None,
        change_high=high if finite else None,
        allowed=allowed,
        reason=reason,
    )


def _difference(before: Value, now: Value) -> tuple[float, float, float]:
    change = now.value - before.value
    return change, change, change


def _quotient(before: Value, now: Value) -> tuple[float, float, float]:
    """now / before - 1 with its bounds; infinite if there was nothing before and there is something now."""
    if not before.value or not now.value:
        change = 0.0 if now.value == before.value else math.inf if not before.value else -1.0
        return change, change, change
    ratio = now.value / before.value

    def spread(own: float | None, other: float | None) -> float:
        sides = ((now.value, own), (before.value, other))
        logs = (math.log(value) - math.log(bound) if bound else 0.0 for value, bound in sides)
        return min(math.hypot(*logs), WIDEST)

    low, high = ratio * math.exp(-spread(now.low, before.high)), ratio * math.exp(spread(now.high, before.low))
    return ratio - 1, low - 1, high - 1


def _placed_elsewhere(before: Measured, now: Measured) -> str | None:
    """A provider or a floating-point precision that the baseline does not use; None if there is none."""
    for what in ("providers", "precisions"):
        if what in before.counts and what in now.counts:
            for name in now.counts[what].keys() - before.counts[what].keys():
                if what == "providers" or "float" in name or "double" in name:
                    return f"{now.counts[what][name]} nodes ran in {name}, in the baseline none"
    return None


def _more_operators(before: Measured, now: Measured) -> str | None:
    """The operators whose number grew."""
    old, new = before.counts.get("operators"), now.counts.get("operators")
    if old is None or new is None:
        return None
    more = {name: count - old.get(name, 0) for name, count in sorted(new.items()) if count > old.get(name, 0)}
    return "more " + ", ".join(f"{name} (+{count})" for name, count in more.items()) if more else None

"""Snapshot: the parts of a report that a check compares; a baseline is a snapshot in a file.

A place is (context, variant): an engine; ("english", "") is a context, ("", "") the whole bundle. Every place
has values, and not_measured says why others are missing. Values are named like the criterion that judges
them (`cpcompile.check.criteria`), followed by the shape if there are several: speed_ratio[1x128].

`baseline.schema.json` beside this file is the contract of the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cpcompile.core.errors import UsageError
from cpcompile.core.json_form import to_json
from cpcompile.core.measured import NotMeasured
from cpcompile.files.whole_files import read_text, whole_file
from cpcompile.report.contents import Report
from cpcompile.report.results import Memory, Parity, Placement, Quality, ShapeSpeed, Speed, ratio_with_bounds

Place: TypeAlias = tuple[str, str]
Judged: TypeAlias = Literal["pass", "fail", "inconclusive"]
BUNDLE: Place = ("", "")

UNKNOWN = "unknown"
"""Architecture of a bundle whose model was not read."""
VERSION = 1
SCHEMA = Path(__file__).with_name("baseline.schema.json")
JUDGED = ("parity", "placement")
"""Criteria that have a verdict of their own."""
MEASURED_AGAIN = ("memory", "private_memory", "speed_ratio")
"""Criteria whose values are noisy."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number and, if it is noisy, its interval."""

    value: float
    low: float | None = None
    high: float | None = None
    interference: str | None = None
    """Other activity of the machine during the measurement; not part of a baseline."""

    def widened(self, other: Value) -> Value:
        """The lower value, and an interval that covers both: for peaks, where all samples are equally valid."""
        values = [v for each in (self, other) for v in (each.value, each.low, each.high) if v is not None]
        return Value(value=min(self.value, other.value), low=min(values), high=max(values))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All compared values of one place."""

    values: Mapping[str, Value] = field(default_factory=dict)
    verdicts: Mapping[str, tuple[Judged, str | None]] = field(default_factory=dict)
    """Criterion -> verdict, and why it is not a pass."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """operators, providers, precisions -> how many nodes."""
    not_measured: Mapping[str, str] = field(default_factory=dict)
    """Criterion -> why it is neither in values nor in verdicts."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that a check compares."""

    model: str
    architecture: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    places: Mapping[Place, Measured]

    @property
    def contexts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(context for context, _ in self.places if context))

    @property
    def engines(self) -> tuple[Place, ...]:
        return tuple(place for place in self.places if place[1])

    def again(self, place: Place, measured: Measured, interference: str | None) -> Snapshot:
        """A copy with new measurements at `place`: new ratios replace the old ones, new peaks widen the intervals."""
        old = self.places[place]
        values = dict(old.values)
        for name, value in measured.values.items():
            fresh = dataclasses.replace(value, interference=interference)
            values[name] = values[name].widened(fresh) if criterion_of(name) != "speed_ratio" else fresh
        return dataclasses.replace(self, places={**self.places, place: dataclasses.replace(old, values=values)})


def criterion_of(name: str) -> str:
    """The criterion that judges the value `name`."""
    return name.partition("[")[0]


def snapshot_of(report: Report) -> Snapshot:
    """The snapshot of a report."""
    places = {BUNDLE: Measured(values={"bundle_bytes": Value(value=report.bundle.bytes)})}
    for context in report.contexts:
        places[context.name, ""] = Measured(values={"parameters": Value(value=context.parameters.kept)})
        for variant in context.variants:
            places[context.name, variant.name] = measured_of(
                size=NotMeasured(variant.reason or "its size is unknown") if variant.bytes is None else variant.bytes,
                parity=variant.parity,
                quality=variant.quality,
                memory=variant.memory,
                speed=variant.speed,
                placement=variant.placement,
                not_run=variant.reason if variant.status != "ran" else None,
            )
    return Snapshot(
        model=report.model.name,
        architecture=report.model.architecture,
        config=report.model.config,
        environment=to_json(report.environment),
        places=places,
    )


def measured_of(
    *,
    size: int | NotMeasured | None = None,
    parity: Parity | None = None,
    quality: Quality | None = None,
    memory: Memory | None = None,
    speed: Speed | None = None,
    placement: Placement | None = None,
    not_run: str | None = None,
) -> Measured:
    """The compared values of one engine. None: that part was not examined; not_run: why the engine was not run."""
    values: dict[str, Value] = {}
    verdicts: dict[str, tuple[Judged, str | None]] = {}
    missing: dict[str, str] = dict.fromkeys(JUDGED, not_run) if not_run else {}

    def take(name: str, value: float | NotMeasured) -> None:
        if isinstance(value, NotMeasured):
            missing[name] = value.reason
        else:
            values[name] = Value(value=value)

    if size is not None:
        take("bytes", size)
    for name, part in (("parity", parity), ("placement", placement)) if not not_run else ():
        if part is None:
            continue
        if isinstance(part.verdict, NotMeasured):
            missing[name] = part.verdict.reason
        else:
            verdicts[name] = (part.verdict, part.reason)
    if parity is not None:
        if parity.tolerance and not isinstance(parity.max_abs_error_float64, NotMeasured):
            values["parity_error"] = Value(value=parity.max_abs_error_float64 / parity.tolerance)
        else:
            missing["parity_error"] = parity.reason or "every error is allowed"
    if quality is not None:
        take("perplexity", quality.perplexity)
        take("accuracy", quality.accuracy)
    if memory is not None:
        take("memory", memory.run_peak_rss_bytes)
        take("private_memory", memory.run_peak_private_bytes)
    if speed is not None:
        if isinstance(speed.shapes, NotMeasured):
            missing["speed_ratio"] = speed.shapes.reason
        for shape in speed.shapes or ():
            where, bounded = f"speed_ratio[{_shape(shape)}]", ratio_with_bounds(shape)
            if isinstance(bounded, NotMeasured):
                missing[where] = bounded.reason
            else:
                ratio, low, high = bounded
                values[where] = Value(value=ratio, low=low, high=high)
    counts: dict[str, Mapping[str, int]] = {}
    if placement is not None:
        found = {name: getattr(placement, name) for name in ("operators", "providers", "precisions")}
        counts = {name: dict(own) for name, own in found.items() if own}
        operators = placement.operators
        take("nodes", operators if isinstance(operators, NotMeasured) else sum(operators.values()))
    return Measured(values=values, verdicts=verdicts, counts=counts, not_measured=missing)


def write_baseline(snapshot: Snapshot, path: Path) -> None:
    """Write `snapshot` to the file `path` atomically."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(_plain(snapshot), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_baseline(path: Path) -> Snapshot:
    """The baseline in the file `path`; UsageError says how to write one if it is missing or invalid."""
    how = f"write it with `cpcompile check BUNDLE --baseline {path} --update-baseline`"
    try:
        plain = json.loads(read_text(path))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such baseline; {how}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {how}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not a baseline ({error}); {how}") from error
    try:
        if plain["baseline_version"] != VERSION:
            found = plain["baseline_version"]
            raise UsageError(f"{path}: baseline version {found!r}, this cpcompile reads {VERSION}; {how}")
        return _snapshot(plain)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"{path}: is not a baseline: a value is missing or malformed ({error}); {how}") from error


def require_same_model(baseline: Snapshot, path: Path, *, architecture: str, contexts: tuple[str, ...]) -> None:
    """Raise UsageError unless the baseline `path` shares its architecture and at least one context with this model.

    architecture "" skips that comparison: it is not known without the model.
    """
    other_kind = bool(architecture) and baseline.architecture not in (architecture, UNKNOWN)
    if other_kind or not set(contexts) & set(baseline.contexts):
        mine = f"{architecture} with the contexts" if architecture else "the contexts"
        raise UsageError(
            f"{path}: is the baseline of another model: {baseline.model} ({baseline.architecture} with the contexts "
            f"{', '.join(baseline.contexts)}), the bundle has {mine} {', '.join(contexts)}; give its own baseline, or "
            "write a new one with --update-baseline"
        )


def _shape(shape: ShapeSpeed) -> str:
    return f"{shape.batch}x{shape.sequence}" if shape.sequence else f"batch {shape.batch}"


def _plain(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "baseline_version": VERSION,
        "model": {
            "name": snapshot.model,
            "architecture": snapshot.architecture,
            "config": dict(snapshot.config),
        },
        "environment": dict(snapshot.environment),
        "places": [
            {
                "context": context or None,
                "variant": variant or None,
                "values": {
                    name: {"value": value.value, "low": value.low, "high": value.high}
                    for name, value in measured.values.items()
                },
                "verdicts": {name: verdict for name, (verdict, _) in measured.verdicts.items()},
                "counts": {name: dict(counts) for name, counts in measured.counts.items()},
                "not_measured": dict(measured.not_measured),
            }
            for (context, variant), measured in snapshot.places.items()
        ],
    }


def _snapshot(plain: Any) -> Snapshot:
    """The inverse of `_plain`; KeyError, TypeError or ValueError for anything else."""
    model = plain["model"]
    places = {
        (_name(place["context"] or ""), _name(place["variant"] or "")): Measured(
            values={_name(name): _value(value) for name, value in place["values"].items()},
            verdicts={_name(name): (_judged(name, verdict), None) for name, verdict in place["verdicts"].items()},
            counts={
                _name(name): {_name(key): int(_number(count)) for key, count in counts.items()}
                for name, counts in place["counts"].items()
            },
            not_measured={_text(name): _text(reason) for name, reason in place["not_measured"].items()},
        )
        for place in plain["places"]
    }
    if BUNDLE not in places or len(places) < len(plain["places"]):
        raise ValueError("the values of the bundle, or has a place twice")
    versions = dict(plain["environment"].get("versions", {}))
    return Snapshot(
        model=_name(model["name"]),
        architecture=_name(model["architecture"]),
        config=dict(model["config"]),
        environment={**plain["environment"], "versions": versions},
        places=places,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r}: text is needed")
    return value


def _name(value: Any) -> str:
    """`value`, or an error if it is not a printable string."""
    if not _text(value).isprintable():
        raise ValueError(f"{value!r}: a name that can be printed is needed")
    return value  # type: ignore[no-any-return]


def _judged(name: Any, value: Any) -> Judged:
    if name not in JUDGED or value not in ("pass", "fail", "inconclusive"):
        raise ValueError(f"{name!r}: {value!r}: a verdict on {' or '.join(JUDGED)} is needed")
    return value  # type: ignore[no-any-return]


def _value(plain: Any) -> Value:
    value, low, high = (None if plain[key] is None else _number(plain[key]) for key in ("value", "low", "high"))
    if value is None or not (value if low is None else low) <= value <= (value if high is None else high):
        raise ValueError(f"{value!r}: a value within its interval is needed")
    return Value(value=value, low=low, high=high)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r}: a number that is not negative is needed")
    return value  # type: ignore[no-any-return]

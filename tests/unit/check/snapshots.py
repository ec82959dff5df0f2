"""A snapshot about which everything is known, and what becomes of it."""

from __future__ import annotations

import dataclasses

from cpcompile.check.baseline import BUNDLE, Judged, Measured, Place, Snapshot, Value

ENGINE = ("de", "cpu-fp32")
VALUES = {
    "bytes": Value(value=4_000_000),
    "parity_error": Value(value=0.1),
    "perplexity": Value(value=20.0),
    "accuracy": Value(value=0.4),
    "memory": Value(value=80_000_000),
    "private_memory": Value(value=40_000_000),
    "nodes": Value(value=170),
    "speed_ratio[1x128]": Value(value=3.0, low=2.95, high=3.05),
}
COUNTS = {
    "operators": {"MatMul": 100, "Add": 70},
    "providers": {"CPUExecutionProvider": 170},
    "precisions": {"float": 160, "int64_t": 10},
}
PASS: dict[str, tuple[Judged, str | None]] = {"parity": ("pass", None), "placement": ("pass", None)}


def snapshot(engine: Measured | None = None, *, place: Place = ENGINE) -> Snapshot:
    """A bundle of one engine."""
    return Snapshot(
        model="model",
        architecture="decoder",
        config={"width": 128},
        environment={"cpu": "a", "versions": {"torch": "2"}},
        places={
            BUNDLE: Measured(values={"bundle_bytes": Value(value=5_000_000)}),
            (place[0], ""): Measured(values={"parameters": Value(value=1_000_000)}),
            place: engine or Measured(values=VALUES, verdicts=PASS, counts=COUNTS),
        },
    )


def changed(**values: Value | float | None) -> Snapshot:
    """With other values of the engine; None: not measured. `speed_ratio` is that of 1x128."""
    now, missing = dict(VALUES), {}
    for key, value in values.items():
        name = "speed_ratio[1x128]" if key == "speed_ratio" else key
        if value is None:
            del now[name]
            missing[name] = "nobody looked"
        else:
            now[name] = value if isinstance(value, Value) else Value(value=value)
    return snapshot(Measured(values=now, verdicts=PASS, counts=COUNTS, not_measured=missing))


def counted(**counts: dict[str, int]) -> Snapshot:
    """With other counts of the engine's nodes."""
    values = dict(VALUES)
    if "operators" in counts:
        values["nodes"] = Value(value=sum(counts["operators"].values()))
    return snapshot(Measured(values=values, verdicts=PASS, counts=COUNTS | counts))


def judged(verdict: Judged, reason: str | None) -> Snapshot:
    """With another verdict of parity."""
    measured = snapshot().places[ENGINE]
    return snapshot(dataclasses.replace(measured, verdicts=PASS | {"parity": (verdict, reason)}))

"""What the benchmarks share: interleaved timing, medians with quartiles, and results that name the machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cpcompile.core.json_form import to_json
from cpcompile.machine.environment import environment
from cpcompile.validation.speed import SETTLE_SECONDS, FloatArray, interleave, warm_up

RESULTS = Path(__file__).parent / "results"


def time_sides(
    sides: Mapping[str, Callable[[], object]], *, rounds: int, settle: float = SETTLE_SECONDS
) -> dict[str, FloatArray]:
    """Seconds of every run of every side: all are warmed up, then timed in interleaved rounds."""
    for run in sides.values():
        warm_up(run)
    return interleave(sides, rounds=rounds, seed=0, settle=settle)


def spread(values: Iterable[float]) -> dict[str, float]:
    """The median and the quartiles."""
    runs = list(values)
    low, median, high = np.percentile(runs, (25, 50, 75)).tolist()
    return {"median": median, "quartile_1": low, "quartile_3": high, "runs": len(runs)}


def save(name: str, result: Mapping[str, Any]) -> None:
    """Write `results/<name>.json` with the machine included, and print its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": to_json(environment()), **result}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")

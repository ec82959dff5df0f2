"""What all benchmarks share: interleaved timing, medians with spread, and the machine in the results."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cpcompile.core.json_form import to_json
from cpcompile.machine.environment import environment
from cpcompile.validation.speed import SETTLE_SECONDS

RESULTS = Path(__file__).parent / "results"


def interleave(sides: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of every run of every side; sides take turns in an order that is drawn anew each round."""
    generator = np.random.default_rng(0)
    for run in sides.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name in generator.permutation(list(sides)):
            started = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def settled(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Interleaved seconds; each side first runs untimed until the threads of the others have gone to sleep."""
    generator = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        for _ in range(10):
            run()
    gc.disable()
    for _ in range(rounds):
        for name in generator.permutation(list(sides)):
            settle = time.perf_counter() + SETTLE_SECONDS
            while time.perf_counter() < settle:
                sides[name]()
            started = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - started)
    gc.enable()
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "quartile_1": low, "quartile_3": high, "runs": len(values)}


def save(name: str, result: Mapping[str, Any]) -> None:
    """Write `results/<name>.json` with the machine noted, and say where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": to_json(environment()), **result}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")

"""What the benchmarks share: sessions and tokens, interleaved timing, medians with quartiles, named results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from cpcompile.core.cache import INPUT, PAST
from cpcompile.core.json_form import to_json
from cpcompile.core.types import Feeds
from cpcompile.machine.environment import environment
from cpcompile.validation.runners import NO_SPINNING_AFTER_RUN
from cpcompile.validation.speed import SETTLE_SECONDS, FloatArray, interleave, warm_up

RESULTS = Path(__file__).parent / "results"


def onnx_session(path: Path, threads: int, extra: Mapping[str, str] = {}, *, profile: Path | None = None) -> Any:
    """A graph in ONNX Runtime on the CPU. extra: session options; profile: how the file of its profile begins."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for key, value in {**NO_SPINNING_AFTER_RUN, **extra}.items():
        options.add_session_config_entry(key, value)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds_of(shapes: Mapping[str, Any], batch: int, tokens: int, past: int) -> Feeds:
    """Tokens that follow `past` others, for a graph whose inputs have those `shapes`."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {INPUT: rng.integers(0, 256, (batch, tokens))}
    for name, shape in shapes.items() if past else ():
        if PAST.fullmatch(name):
            feeds[name] = rng.standard_normal((batch, shape[1], past, shape[3]), dtype=np.float32)
    return feeds


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
    wrote(path)


def wrote(path: Path) -> None:
    """Print the path of a file of results."""
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")

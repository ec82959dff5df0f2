"""Speed: engine against eager model, side by side in one process.

    warm up both -> rounds x { shuffled sides: settle, time one run } -> percentiles, paired bootstrap

Interleaving spreads whatever the machine does meanwhile over both sides; the order within a round
is drawn, so that none is always second. Worker threads outlive a run: ONNX Runtime's pool spins
for tens of milliseconds after it (measured: about 40), libgomp's under torch for 4 to 10, each on
the cores that the other side wants. So the engine gets `session.force_spinning_stop`, which lets
its threads spin within a run and not after it (an application that runs nothing else between two
calls would not want that; a comparison does); torch has no such switch, so each side settles first:
it runs untimed until the other's threads have gone to sleep, which also warms its caches.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from cpcompile.runtime import Feeds
from cpcompile.validation.reference import Run, Timed

FloatArray = npt.NDArray[np.float64]

NO_SPINNING_AFTER_RUN: Mapping[str, str] = {"session.force_spinning_stop": "1"}
"""Session options of ONNX Runtime for an engine that is timed beside another runtime."""

SETTLE_SECONDS = 0.02
STABLE_WITHIN = 0.05
WARM_UP_RUNS = (10, 60)
"""At least, at most."""
RESAMPLES = 2000
EAGER_FIELDS = ("eager_p50_ms", "eager_p90_ms", "eager_p99_ms", "ratio", "ratio_low", "ratio_high")
NO_SEQUENCE = "the inputs are not text"


@dataclass(frozen=True, kw_only=True)
class ShapeSpeed:
    """Latency of one run at (batch, sequence); ratio = eager p50 / engine p50, with its 95 % interval."""

    batch: int
    sequence: int | None
    p50_ms: float
    p90_ms: float
    p99_ms: float
    eager_p50_ms: float | None = None
    eager_p90_ms: float | None = None
    eager_p99_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    rounds: int
    not_measured: Mapping[str, str] = field(default_factory=dict)
    """Field -> why it is null."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Latency at several shapes, both sides with the same number of threads."""

    shapes: tuple[ShapeSpeed, ...] | None
    threads: int | None = None
    not_measured: Mapping[str, str] = field(default_factory=dict)
    """Field -> why it is null."""

    @classmethod
    def not_run(cls, reason: str) -> Speed:
        return cls(shapes=None, not_measured={"shapes": reason, "threads": reason})


def measure_speed(
    engine: Run,
    eager: Run | str,
    inputs: Sequence[Timed],
    *,
    rounds: int,
    threads: int,
    seed: int = 0,
    settle: float = SETTLE_SECONDS,
) -> Speed:
    """Time `engine` and `eager` (or the reason why there is none) on all of `inputs`."""
    results = []
    for timed in inputs:
        sides = {"engine": engine} if isinstance(eager, str) else {"engine": engine, "eager": eager}
        runs = {name: _bound(run, timed.feeds) for name, run in sides.items()}
        for run in runs.values():
            warm_up(run)
        times = interleave(runs, rounds=rounds, seed=seed, settle=settle)
        results.append(_shape_speed(timed, times, seed, eager if isinstance(eager, str) else None))
    return Speed(shapes=tuple(results), threads=threads)


def warm_up(run: Callable[[], object]) -> int:
    """Run until the last five runs take as long as the five before, within limits; returns the number of runs."""
    least, most = WARM_UP_RUNS
    times: list[float] = []
    while len(times) < most:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if len(times) >= least:
            before, last = np.median(times[-10:-5]), np.median(times[-5:])
            if abs(last - before) <= STABLE_WITHIN * before:
                break
    return len(times)


def interleave(
    sides: Mapping[str, Callable[[], object]], *, rounds: int, seed: int, settle: float = SETTLE_SECONDS
) -> dict[str, FloatArray]:
    """Seconds of one run per side and round, arrays (rounds,)."""
    rng = np.random.default_rng(seed)
    names = list(sides)
    times = {name: np.empty(rounds) for name in names}
    with _no_garbage_collection():
        for index in range(rounds):
            for name in rng.permutation(names):
                run = sides[name]
                quiet = time.perf_counter() + settle
                while time.perf_counter() < quiet:
                    run()
                start = time.perf_counter()
                run()
                times[name][index] = time.perf_counter() - start
    return times


def ratio_interval(eager: FloatArray, engine: FloatArray, *, seed: int) -> tuple[float, float, float]:
    """Median ratio eager / engine and its 95 % percentile bootstrap interval over paired rounds (Efron 1979)."""
    rounds = np.random.default_rng(seed).integers(len(eager), size=(RESAMPLES, len(eager)))
    ratios = np.median(eager[rounds], axis=1) / np.median(engine[rounds], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(np.median(eager) / np.median(engine)), float(low), float(high)


def _shape_speed(timed: Timed, times: Mapping[str, FloatArray], seed: int, no_eager: str | None) -> ShapeSpeed:
    p50, p90, p99 = _percentiles_ms(times["engine"])
    alone = ShapeSpeed(
        batch=timed.batch,
        sequence=timed.sequence,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        rounds=len(times["engine"]),
        not_measured={} if timed.sequence is not None else {"sequence": NO_SEQUENCE},
    )
    if no_eager is not None:
        return replace(alone, not_measured={**alone.not_measured, **dict.fromkeys(EAGER_FIELDS, no_eager)})
    p50, p90, p99 = _percentiles_ms(times["eager"])
    ratio, low, high = ratio_interval(times["eager"], times["engine"], seed=seed)
    return replace(
        alone, eager_p50_ms=p50, eager_p90_ms=p90, eager_p99_ms=p99, ratio=ratio, ratio_low=low, ratio_high=high
    )


def _percentiles_ms(seconds: FloatArray) -> tuple[float, float, float]:
    p50, p90, p99 = (float(value) for value in np.percentile(seconds * 1e3, (50, 90, 99)))
    return p50, p90, p99


def _bound(run: Run, feeds: Feeds) -> Callable[[], object]:
    return lambda: run(feeds)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection that falls into a timed run is not the run's cost."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

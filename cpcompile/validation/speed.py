"""Speed: engine against eager model and other peers, side by side in one process.

    warm up all -> rounds x { shuffled sides: settle, time one run } -> percentiles, paired bootstrap -> verdict

Interleaving spreads other activity of the machine over both sides; the order within a round
is random, so that no side is always second. Worker threads outlive a run: ONNX Runtime's pool spins
for tens of milliseconds after it (measured: about 40), libgomp's under torch for 4 to 10, each on
the cores that the other side wants. So engines get `session.force_spinning_stop` (`runners`), which lets
their threads spin within a run and not after it (an application that runs nothing else between two
calls would not want that; a comparison does); torch has no such switch, so each side settles first:
it runs untimed until the other's threads have gone to sleep, which also warms its caches.

If a minimum ratio is required, the interval has to lie on one side of it: until it does, the rounds are doubled, up
to LARGEST_FACTOR times their number; if it is still undecided the verdict is inconclusive, and the reason says what
else the machine did.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from cpcompile.core.measured import NotMeasured, measurable
from cpcompile.core.types import Feeds, Steps, unwatched
from cpcompile.machine.noise import watch_machine
from cpcompile.report.results import PeerSpeed, ShapeSpeed, Speed, Verdict
from cpcompile.validation.reference import Run, Timed

FloatArray = npt.NDArray[np.float64]

SETTLE_SECONDS = 0.02
STABLE_WITHIN = 0.05
WARM_UP_RUNS = (10, 60)
"""Smallest and largest value."""
RESAMPLES = 2000
LARGEST_FACTOR = 8
"""The rounds may grow to this many times their number."""
NOTHING_DEMANDED = "no least ratio was demanded"
QUANTILES = 21
NO_SEQUENCE = "the inputs are not text"
EAGER_FIELDS = tuple(name for name in measurable(ShapeSpeed) if name != "sequence")


def measure_speed(
    engine: Run,
    eager: Run | NotMeasured,
    inputs: Sequence[Timed],
    *,
    rounds: int,
    threads: int,
    least_ratio: float = 0.0,
    against: str = "eager",
    peers: Mapping[str, Run] | None = None,
    seed: int = 0,
    settle: float = SETTLE_SECONDS,
    steps: Steps = unwatched,
) -> Speed:
    """Time `engine`, `eager` (if there is one) and `peers` on all of `inputs`.

    least_ratio: eager p50 / engine p50 that is required at every shape; 0 means no minimum. against: what `eager`
    is called in the reason. steps: told of every round.
    """
    sides = {"engine": engine, **({} if isinstance(eager, NotMeasured) else {"eager": eager}), **(peers or {})}
    shapes, verdicts = [], []
    done, total = 0, rounds * len(inputs)
    steps(done, total)

    def timed_one() -> None:
        nonlocal done
        done += 1
        steps(done, total)

    with watch_machine() as machine:
        for timed in inputs:
            runs = {name: _bound(run, timed.feeds) for name, run in sides.items()}
            for run in runs.values():
                warm_up(run)
            times = interleave(runs, rounds=rounds, seed=seed, settle=settle, after_round=timed_one)
            verdict = _judge(times, least_ratio, seed)
            while verdict == "inconclusive" and "eager" in times and len(times["engine"]) < LARGEST_FACTOR * rounds:
                again = len(times["engine"])
                total += again
                more = interleave(runs, rounds=again, seed=seed + again, settle=settle, after_round=timed_one)
                times = {name: np.concatenate([times[name], more[name]]) for name in times}
                verdict = _judge(times, least_ratio, seed)
            shapes.append(_shape_speed(timed, times, seed, eager if isinstance(eager, NotMeasured) else None))
            verdicts.append(verdict)
    if least_ratio <= 0:
        return Speed(verdict=NotMeasured(NOTHING_DEMANDED), shapes=tuple(shapes), threads=threads)
    worst = next(v for v in ("fail", "inconclusive", "pass") if v in verdicts)
    missed = [
        _missed(shape, least_ratio, against) for shape, v in zip(shapes, verdicts, strict=True) if v == worst != "pass"
    ]
    noisy = worst == "inconclusive" and "eager" in sides
    while_busy = f" ({machine.interference})" if noisy and machine.interference else ""
    return Speed(verdict=worst, reason="; ".join(missed) + while_busy or None, shapes=tuple(shapes), threads=threads)


def _judge(times: Mapping[str, FloatArray], least_ratio: float, seed: int) -> Verdict:
    """Whether eager is at least `least_ratio` times as slow as the engine."""
    if least_ratio <= 0:
        return "pass"
    if "eager" not in times:
        return "inconclusive"
    _, low, high = ratio_interval(times["eager"], times["engine"], seed=seed)
    return "pass" if low >= least_ratio else "fail" if high < least_ratio else "inconclusive"


def _missed(shape: ShapeSpeed, least_ratio: float, against: str) -> str:
    where = f"batch {shape.batch}" if isinstance(shape.sequence, NotMeasured) else f"{shape.batch} x {shape.sequence}"
    if isinstance(shape.ratio, NotMeasured):
        return f"{where}: {shape.ratio}"
    interval = f"{shape.ratio:.2f} ({shape.ratio_low:.2f} to {shape.ratio_high:.2f})"
    return f"{where}: {interval} times as fast as {against} after {shape.rounds} rounds, demanded are {least_ratio:g}"


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
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seed: int,
    settle: float = SETTLE_SECONDS,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, FloatArray]:
    """Seconds of one run per side and round, arrays (rounds,); `after_round` is called between the rounds."""
    rng = np.random.default_rng(seed)
    names = list(sides)
    times = {name: np.empty(rounds) for name in names}
    with without_garbage_collection():
        for index in range(rounds):
            for name in rng.permutation(names):
                run = sides[name]
                quiet = time.perf_counter() + settle
                while time.perf_counter() < quiet:
                    run()
                start = time.perf_counter()
                run()
                times[name][index] = time.perf_counter() - start
            after_round()
    return times


def ratio_interval(eager: FloatArray, engine: FloatArray, *, seed: int) -> tuple[float, float, float]:
    """Median ratio eager / engine and its 95 % percentile bootstrap interval over paired rounds (Efron 1979)."""
    rounds = np.random.default_rng(seed).integers(len(eager), size=(RESAMPLES, len(eager)))
    ratios = np.median(eager[rounds], axis=1) / np.median(engine[rounds], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(np.median(eager) / np.median(engine)), float(low), float(high)


def _shape_speed(timed: Timed, times: Mapping[str, FloatArray], seed: int, no_eager: NotMeasured | None) -> ShapeSpeed:
    p50, p90, p99 = _percentiles_ms(times["engine"])
    return ShapeSpeed(
        batch=timed.batch,
        sequence=NotMeasured(NO_SEQUENCE) if timed.sequence is None else timed.sequence,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        quantiles_ms=_quantiles_ms(times["engine"]),
        peers={name: _peer_speed(times, name, seed) for name in times if name not in ("engine", "eager")},
        rounds=len(times["engine"]),
        **(_eager_speed(times, seed) if no_eager is None else dict.fromkeys(EAGER_FIELDS, no_eager)),
    )


def _eager_speed(times: Mapping[str, FloatArray], seed: int) -> dict[str, Any]:
    """The fields of `ShapeSpeed` that concern the eager model."""
    quantiles = _quantiles_ms(times["eager"])
    ratios = ratio_interval(times["eager"], times["engine"], seed=seed)
    return dict(zip(EAGER_FIELDS, (*_percentiles_ms(times["eager"]), quantiles, *ratios), strict=True))


def _peer_speed(times: Mapping[str, FloatArray], name: str, seed: int) -> PeerSpeed:
    ratio, low, high = ratio_interval(times[name], times["engine"], seed=seed)
    p50, _, _ = _percentiles_ms(times[name])
    return PeerSpeed(p50_ms=p50, ratio=ratio, ratio_low=low, ratio_high=high)


def _percentiles_ms(seconds: FloatArray) -> tuple[float, float, float]:
    p50, p90, p99 = (float(value) for value in np.percentile(seconds * 1e3, (50, 90, 99)))
    return p50, p90, p99


def _quantiles_ms(seconds: FloatArray) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(seconds * 1e3, np.linspace(0, 1, QUANTILES)))


def _bound(run: Run, feeds: Feeds) -> Callable[[], object]:
    return lambda: run(feeds)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: a collection during a timed run is not part of its cost."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""Throughput: concurrent requests per second, engine against eager model.

    workers = cores, one thread each      rounds x { shuffled sides: all workers run until the time is over } -> rates

This is how a server runs a small model: one request per core scales better than one request on all cores. On both
sides all workers share one model in memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Steps, unwatched
from cpcompile.report.results import Throughput
from cpcompile.validation.speed import ratio_interval, without_garbage_collection

SECONDS = 0.25
"""Minimum duration of one side in one round."""
RUNS = 3
"""Minimum runs of each worker in one round, as estimated from the first run."""
ROUNDS = 7
"""Maximum number of rounds; fewer if the validation has fewer."""


def measure_throughput(
    engine: Callable[[], object],
    eager: Callable[[], object] | NotMeasured,
    *,
    workers: int,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    seed: int = 0,
    steps: Steps = unwatched,
) -> Throughput:
    """Load both sides, or the engine alone where there is no `eager`.

    A run must use one thread and must be safe to call from several.
    """
    sides = {"engine": engine} if isinstance(eager, NotMeasured) else {"engine": engine, "eager": eager}
    lengths = {name: max(seconds, RUNS * _second_run(run)) for name, run in sides.items()}
    rng, rates = np.random.default_rng(seed), {name: np.empty(rounds) for name in sides}
    with without_garbage_collection():
        for index in range(rounds):
            steps(index, rounds)
            for name in rng.permutation(list(sides)):
                rates[name][index] = _rate(sides[name], workers, lengths[name])
    steps(rounds, rounds)
    rate = {name: float(np.median(each)) for name, each in rates.items()}
    if isinstance(eager, NotMeasured):
        return Throughput.without(eager.reason, workers=workers, requests_per_second=rate["engine"])
    ratio, low, high = ratio_interval(1 / rates["eager"], 1 / rates["engine"], seed=seed)
    return Throughput(
        workers=workers,
        requests_per_second=rate["engine"],
        eager_requests_per_second=rate["eager"],
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
    )


def _second_run(run: Callable[[], object]) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _rate(run: Callable[[], object], workers: int, seconds: float) -> float:
    """Runs per second of `workers` threads; none begins a run after the time is over, and all that were begun count."""
    ends: npt.NDArray[np.float64] = np.zeros(workers)
    counts = np.zeros(workers, dtype=np.int64)
    faults: list[BaseException] = []
    barrier = threading.Barrier(workers + 1)

    def work(worker: int) -> None:
        barrier.wait()
        try:
            while time.perf_counter() < deadline:
                run()
                counts[worker] += 1
        except BaseException as error:
            faults.append(error)
        ends[worker] = time.perf_counter()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    deadline = time.perf_counter() + seconds
    barrier.wait()
    start = deadline - seconds
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return float(counts.sum() / (ends.max() - start))

from __future__ import annotations

import gc
import re
import time

import numpy as np
import numpy.typing as npt
import pytest

from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Feeds
from cpcompile.report.results import Speed
from cpcompile.validation.reference import Outputs, Run, Timed
from cpcompile.validation.speed import (
    EAGER_FIELDS,
    LARGEST_FACTOR,
    NOTHING_DEMANDED,
    WARM_UP_RUNS,
    interleave,
    measure_speed,
    ratio_interval,
    warm_up,
)
from cpcompile.validation.throughput import measure_throughput


def synthetic_rounds(seed: int, rounds: int = 60) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Eager takes twice as long; the machine drifts under both alike, and each has noise of its own."""
    rng = np.random.default_rng(seed)
    drift = np.exp(rng.normal(0, 0.2, size=rounds))
    eager, engine = (np.exp(rng.normal(0, 0.05, size=rounds)) for _ in range(2))
    return 2 * drift * eager, drift * engine


def test_the_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    intervals = [ratio_interval(*synthetic_rounds(seed), seed=seed) for seed in range(200)]
    assert all(low <= ratio <= high for ratio, low, high in intervals)
    covered = sum(low <= 2 <= high for _, low, high in intervals)
    assert 180 <= covered <= 200
    assert np.median([high - low for _, low, high in intervals]) < 0.5


def test_pairing_takes_the_drift_out() -> None:
    """The same times in rounds that do not belong together leave the ratio as it is and widen its interval."""
    eager, engine = synthetic_rounds(1)
    ratio, low, high = ratio_interval(eager, engine, seed=0)
    unpaired, wide_low, wide_high = ratio_interval(eager, np.random.default_rng(9).permutation(engine), seed=0)
    assert unpaired == ratio
    assert wide_high - wide_low > 1.5 * (high - low)


def test_the_interval_is_a_function_of_its_seed() -> None:
    eager, engine = synthetic_rounds(3)
    assert ratio_interval(eager, engine, seed=1) == ratio_interval(eager, engine, seed=1)
    assert ratio_interval(eager, engine, seed=1) != ratio_interval(eager, engine, seed=2)


def test_rounds_hold_each_side_once_in_a_drawn_order() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in ("engine", "eager")}
    times = interleave(sides, rounds=40, seed=0, settle=0)
    pairs = list(zip(calls[::2], calls[1::2], strict=True))
    assert len(pairs) == 40
    assert set(pairs) == {("engine", "eager"), ("eager", "engine")}
    assert {name: len(seconds) for name, seconds in times.items()} == {"engine": 40, "eager": 40}
    first = calls.copy()
    calls.clear()
    interleave(sides, rounds=40, seed=0, settle=0)
    assert calls == first


def test_timing_leaves_the_garbage_collector_as_it_was() -> None:
    states: list[bool] = []
    interleave({"engine": lambda: states.append(gc.isenabled())}, rounds=2, seed=0, settle=0)
    assert states == [False, False]
    assert gc.isenabled()


def test_warm_up_keeps_its_limits() -> None:
    least, most = WARM_UP_RUNS
    assert least <= warm_up(lambda: sum(range(1000))) <= most


def _work(feeds: Feeds) -> Outputs:
    return {"sines": np.sin(np.broadcast_to(feeds["x"][..., None], (*feeds["x"].shape, 50)))}


def _timed(*shapes: tuple[int, int]) -> list[Timed]:
    return [Timed(*shape, {"x": np.resize(np.arange(50), shape)}) for shape in shapes]


def test_speed_has_a_row_per_shape_whose_numbers_fit_together() -> None:
    speed = measure_speed(_work, _work, _timed((1, 8), (2, 300)), rounds=9, threads=1, settle=0)
    assert speed.shapes and speed.threads == 1 and speed.not_measured == {"verdict": NOTHING_DEMANDED}
    assert [(row.batch, row.sequence, row.rounds) for row in speed.shapes] == [(1, 8, 9), (2, 300, 9)]
    for row in speed.shapes:
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms
        assert len(row.quantiles_ms) == len(row.eager_quantiles_ms) == 21
        assert list(row.quantiles_ms) == sorted(row.quantiles_ms)
        assert row.quantiles_ms[10] == pytest.approx(row.p50_ms, rel=1e-12)
        assert row.eager_quantiles_ms[18] == pytest.approx(row.eager_p90_ms, rel=1e-12)
        assert 0 < row.eager_p50_ms <= row.eager_p90_ms <= row.eager_p99_ms
        assert row.ratio == pytest.approx(row.eager_p50_ms / row.p50_ms, rel=1e-9)
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert not row.not_measured


def test_without_a_baseline_the_engine_is_timed_alone() -> None:
    speed = measure_speed(_work, NotMeasured("no baseline"), _timed((1, 8)), rounds=3, threads=1, settle=0)
    (row,) = speed.shapes
    assert row.p50_ms > 0
    assert all(isinstance(getattr(row, name), NotMeasured) for name in EAGER_FIELDS)
    assert row.not_measured == dict.fromkeys(EAGER_FIELDS, "no baseline")


def test_inputs_that_are_no_text_have_no_sequence() -> None:
    timed = Timed(2, None, {"x": np.zeros((2, 3, 4))})
    (row,) = measure_speed(_work, _work, [timed], rounds=3, threads=1, settle=0).shapes
    assert row.batch == 2 and isinstance(row.sequence, NotMeasured)
    assert set(row.not_measured) == {"sequence"}


def _slow(feeds: Feeds) -> Outputs:
    time.sleep(0.002)
    return _work(feeds)


def test_a_demanded_ratio_is_judged_by_its_interval() -> None:
    fast, slow = _work, _slow

    def speed(engine: Run, least_ratio: float) -> Speed:
        return measure_speed(engine, slow, _timed((1, 8)), rounds=5, threads=1, least_ratio=least_ratio, settle=0)

    assert speed(fast, 2).verdict == "pass" and speed(fast, 2).reason is None
    failed = speed(slow, 2)
    assert failed.verdict == "fail"
    assert re.search(r"^1 x 8: \d\.\d\d \(.* to .*\) times as fast as eager .* demanded are 2$", failed.reason)


def test_what_the_interval_does_not_decide_is_measured_longer_and_then_inconclusive() -> None:
    calls = iter(range(10**6))

    def erratic(feeds: Feeds) -> Outputs:  # half of its runs are ten times as long as the other half
        time.sleep(0.0005 if next(calls) % 2 else 0.005)
        return _work(feeds)

    def even(feeds: Feeds) -> Outputs:
        time.sleep(0.00275)
        return _work(feeds)

    speed = measure_speed(erratic, even, _timed((1, 8)), rounds=4, threads=1, least_ratio=1, settle=0)
    assert speed.verdict == "inconclusive"
    assert speed.shapes[0].rounds == 4 * LARGEST_FACTOR
    assert speed.shapes[0].ratio_low < 1 <= speed.shapes[0].ratio_high
    assert "after 32 rounds" in speed.reason


def test_without_a_baseline_a_demanded_ratio_is_undecided() -> None:
    speed = measure_speed(
        _work, NotMeasured("no baseline"), _timed((1, 8)), rounds=2, threads=1, least_ratio=1, settle=0
    )
    assert speed.verdict == "inconclusive" and speed.reason == "1 x 8: no baseline"


def test_peers_are_timed_in_the_same_rounds() -> None:
    (row,) = measure_speed(
        _work, NotMeasured("no baseline"), _timed((1, 8)), rounds=5, threads=1, peers={"slow": _slow}, settle=0
    ).shapes
    assert list(row.peers) == ["slow"]
    assert row.peers["slow"].p50_ms > 2 and row.peers["slow"].ratio_low > 2


def test_throughput_counts_what_several_workers_do_at_a_time() -> None:
    """Sleeping needs no processor: four workers do four times as much, and half the sleep gives twice the rate."""
    one, four = (
        measure_throughput(lambda: time.sleep(0.01), lambda: time.sleep(0.02), workers=workers, rounds=3, seconds=0.1)
        for workers in (1, 4)
    )
    assert four.workers == 4
    assert 2.5 < four.requests_per_second / one.requests_per_second < 5
    for found in (one, four):
        assert 1.5 < found.ratio_low <= found.ratio <= found.ratio_high < 2.5
        assert not found.not_measured


def test_throughput_of_an_engine_alone_and_of_one_that_raises() -> None:
    alone = measure_throughput(lambda: time.sleep(0.001), NotMeasured("no baseline"), workers=2, rounds=2, seconds=0.01)
    assert alone.requests_per_second > 0 and set(alone.not_measured.values()) == {"no baseline"}
    turns = iter(range(3))
    with pytest.raises(StopIteration):
        measure_throughput(lambda: next(turns), NotMeasured("no baseline"), workers=2, rounds=2, seconds=0.01)

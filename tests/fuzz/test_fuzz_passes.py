"""Random graphs, always the same ones; `python -m tests.fuzz.fuzz_passes --cases 5000` runs many more."""

import pytest

from tests.fuzz.batches import run_batch
from tests.fuzz.fuzz_passes import MODULE, SECONDS_PER_PROCESS


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (50, 100, 150))])
def test_optimized_graphs_compute_the_same(first: int) -> None:
    findings, tally = run_batch(MODULE, first, 50, SECONDS_PER_PROCESS)
    assert findings == []
    assert tally["graphs"] >= 47
    assert tally["optimized"] == 2 * tally["graphs"]
    assert tally["nodes"] >= 30 * tally["graphs"]
    assert tally["smaller"] > 0.6 * tally["graphs"]
    assert tally["parameters_left"] < 0.85 * tally["parameters"]


@pytest.mark.slow
def test_many_optimized_graphs_compute_the_same() -> None:
    findings, tally = run_batch(MODULE, 1000, 300, SECONDS_PER_PROCESS)
    assert findings == []
    assert tally["graphs"] > 285


@pytest.mark.parametrize("seed", [370, 1600, 2812, 3149, 3409, 30201])
def test_graphs_that_once_failed(seed: int) -> None:
    findings, tally = run_batch(MODULE, seed, 1, SECONDS_PER_PROCESS)
    assert findings == []
    assert tally["optimized"] == 2

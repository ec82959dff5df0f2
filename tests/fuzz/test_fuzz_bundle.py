"""A few cases of the fuzzer, always the same ones."""

import sys

import pytest

from tests.fuzz.batches import run_batch
from tests.fuzz.fuzz_bundle import MODULE, SECONDS_PER_PROCESS


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_changed_bundles_work_or_are_refused() -> None:
    findings, tally = run_batch(MODULE, 1, 200, SECONDS_PER_PROCESS)
    assert findings == []
    assert tally["refused"] > 100
    assert tally["worked"] > 5  # such as those whose weights are other numbers, well sealed

"""A few cases of the fuzzer, always the same ones."""

import sys

import pytest

from tests.fuzz.fuzz_bundle import run_batch


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_changed_bundles_work_or_are_refused() -> None:
    findings, refused, worked = run_batch(1, 200)
    assert findings == []
    assert refused > 100
    assert worked > 5  # such as those whose weights are other numbers, well sealed

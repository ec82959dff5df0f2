from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from cpcompile.bundle.reader import Bundle
from cpcompile.core.measured import NotMeasured
from cpcompile.machine.gpu import video_memory
from cpcompile.machine.memory import NO_PRIVATE, ProcessMemory
from cpcompile.machine.subprocesses import in_fresh_process
from cpcompile.validation.memory import compare_memory, measure_eager, measure_engine

MIB = 2**20
FEEDS = {"input_ids": np.zeros((1, 16), dtype=np.int64)}


def test_engine_and_eager_model_in_processes_of_their_own(bundle: Bundle, dense_path: Path) -> None:
    engine = measure_engine(bundle.root, "de", "cpu-fp32", FEEDS, threads=1)
    eager = measure_eager(dense_path, FEEDS, threads=1)
    assert isinstance(engine, ProcessMemory), engine
    assert isinstance(eager, ProcessMemory), eager
    for side in (engine, eager):
        assert MIB < side.base_rss_bytes <= side.load_peak_rss_bytes
        assert side.base_rss_bytes <= side.run_peak_rss_bytes
        if sys.platform == "linux":
            assert MIB < side.run_peak_private_bytes < side.run_peak_rss_bytes - 10 * MIB  # libraries are files
    # torch alone weighs more than the engine's whole process, so neither side measured the other or this process.
    assert engine.run_peak_rss_bytes < eager.base_rss_bytes


def test_the_eager_model_brings_nothing_of_a_compiler(dense_path: Path) -> None:
    """What torch imports in order to trace (torch._dynamo, sympy: 70 MB) would count as memory of the eager model."""
    code = (
        "import json, sys; from pathlib import Path; from cpcompile.frontend.checkpoint import load_checkpoint; "
        "load_checkpoint(Path(sys.argv[1])).model; print(json.dumps([*sys.modules]))"
    )
    modules = in_fresh_process("-c", code, str(dense_path))
    assert "torch" in modules
    assert not {"torch._dynamo", "sympy", "onnx", "onnx_ir", "onnxruntime"} & set(modules)


@pytest.mark.parametrize("content", [pytest.param(b"", marks=pytest.mark.slow), b"not a checkpoint"])
def test_a_side_that_fails_is_the_reason(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    reason = measure_eager(path, FEEDS, threads=1)
    assert isinstance(reason, NotMeasured)
    assert "UsageError" in reason.reason and "model.pt" in reason.reason


def test_an_unknown_variant_is_the_reason(bundle: Bundle) -> None:
    reason = measure_engine(bundle.root, "de", "cuda-fp16", FEEDS, threads=1)
    assert isinstance(reason, NotMeasured)
    assert "has no variant 'cuda-fp16'" in reason.reason


def measured(**sampled: int) -> ProcessMemory:
    own = {"base_rss_bytes": 1, "load_peak_rss_bytes": 2, "run_peak_rss_bytes": 3, "load_ms": 4.0, "first_run_ms": 5.0}
    return ProcessMemory.without(NO_PRIVATE, vram_bytes=video_memory(), **own, **sampled)


def test_a_missing_side_is_null_with_its_reason() -> None:
    sampled = {"base_private_bytes": 4, "load_peak_private_bytes": 5, "run_peak_private_bytes": 6}
    engine = measured(**sampled)
    memory = compare_memory(engine, NotMeasured("no baseline"))
    assert (memory.base_rss_bytes, memory.load_peak_rss_bytes, memory.run_peak_rss_bytes) == (1, 2, 3)
    assert (memory.base_private_bytes, memory.load_peak_private_bytes, memory.run_peak_private_bytes) == (4, 5, 6)
    assert isinstance(memory.eager_run_peak_rss_bytes, NotMeasured) and memory.vram_bytes == video_memory()
    assert memory.not_measured == {"vram_bytes": str(video_memory())} | {
        f"eager_{when}_{what}_bytes": "no baseline"
        for when in ("base", "load_peak", "run_peak")
        for what in ("rss", "private")
    }


def test_a_system_that_does_not_tell_private_memory_is_the_reason() -> None:
    engine = measured()
    memory = compare_memory(engine, engine)
    assert isinstance(memory.run_peak_private_bytes, NotMeasured)
    assert memory.not_measured["run_peak_private_bytes"] == NO_PRIVATE

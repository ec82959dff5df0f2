"""The parts of running plans that need no GPU: the choice of a profile, and the messages where there is no GPU."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from cpcompile.bundle.reader import Variant
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.machine.gpu import gpu_model
from cpcompile.runtime.plan import choose_profile, load_plan, why_not_here, why_not_taken
from cpcompile.targets.plan_info import PlanInfo, Profile, Shapes
from cpcompile.targets.tensorrt_library import load_library, logger_of
from cpcompile.validation.runners import engine_runner

PLAN = Path("engine.plan")
IDS: tuple[Shapes, ...] = (((1, 1), (1, 64), (4, 128)), ((1, 1), (1, 1), (8, 1)))
PAST: tuple[Shapes, ...] = (((1, 0), (1, 0), (4, 0)), ((1, 0), (1, 64), (8, 255)))
PROFILES = tuple(
    Profile(name=name, shapes={"input_ids": ids, "past": past})
    for name, ids, past in zip(("prefill", "decode"), IDS, PAST, strict=True)
)
INFO = PlanInfo(
    flavour="tensorrt-rtx",
    version="1.7.1.116",
    capabilities=("sm86", "sm120"),
    precision="fp16",
    profiles=(Profile(name="default", shapes={"input_ids": IDS[0]}),),
    tensors=(),
    onnx_digest="0" * 64,
)
VARIANT = Variant(
    context="english",
    name="tensorrt-rtx-fp16",
    runtime="tensorrt-rtx",
    precision="fp16",
    provider="",
    model=PLAN,
    weights=None,
    session_options={},
    provider_options={},
    feeds={},
    bytes=1,
    plan=INFO,
)
without_gpu = pytest.mark.skipif(gpu_model() is not None, reason="there is a GPU here")


@pytest.mark.parametrize(
    ("ids", "past", "index"),
    [((4, 128), (4, 0), 0), ((1, 1), (1, 0), 0), ((1, 1), (1, 7), 1), ((8, 1), (8, 255), 1)],
)
def test_the_first_profile_that_takes_all_shapes(ids: tuple[int, ...], past: tuple[int, ...], index: int) -> None:
    assert choose_profile(PLAN, PROFILES, {"input_ids": ids, "past": past}) == index


@pytest.mark.parametrize(
    ("ids", "past", "said"),
    [
        ((9, 1), (8, 0), r"input_ids is \(9, 1\); the engine takes \(1, 1\) to \(4, 128\) or \(1, 1\) to \(8, 1\)"),
        ((1, 129), (1, 0), r"input_ids is \(1, 129\)"),
        ((1,), (1, 0), r"input_ids is \(1,\)"),
        ((1, 1), (1, 256), r"past is \(1, 256\)"),
        ((1, 64), (1, 7), "no profile of the engine takes .* together"),
    ],
)
def test_shapes_that_no_profile_takes_are_named(ids: tuple[int, ...], past: tuple[int, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choose_profile(PLAN, PROFILES, {"input_ids": ids, "past": past})


def test_inputs_that_a_plan_takes_and_that_it_does_not() -> None:
    assert why_not_taken(VARIANT, {"input_ids": np.zeros((4, 128))}) is None
    assert "(5, 128); the engine takes" in str(why_not_taken(VARIANT, {"input_ids": np.zeros((5, 128))}))
    assert why_not_taken(dataclasses.replace(VARIANT, plan=None), {"input_ids": np.zeros((5, 128))}) is None


@without_gpu
def test_without_a_gpu_a_plan_is_not_run() -> None:
    assert why_not_here(VARIANT) == "no NVIDIA GPU"
    with pytest.raises(CpcompileError, match=r"engine.plan: torch finds no GPU; `cpcompile doctor` says what"):
        load_plan(VARIANT)
    with pytest.raises(CpcompileError, match="torch finds no GPU"), engine_runner(VARIANT, threads=1).load():
        pass


def test_a_library_that_is_not_there_or_breaks_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(
        UsageError, match=r"tensorrt needs .* \(libnvinfer.so.11: .*\): pip install .*`cpcompile doctor`"
    ):
        load_library("tensorrt")


def test_the_logger_keeps_errors_and_is_one_per_library() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")
    log = logger_of(trt)
    assert logger_of(trt) is log
    with log.listening() as messages:
        log.log(trt.ILogger.Severity.WARNING, "a warning")
        log.log(trt.ILogger.Severity.ERROR, "an error")
        log.log(trt.ILogger.Severity.INTERNAL_ERROR, "another")
    assert messages == ["an error", "another"]

"""What the command line asks for, and what a bundle records of an engine."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cpcompile.core.config import ROUNDED
from cpcompile.core.errors import UsageError
from cpcompile.targets.plan_info import PlanInfo, Profile, TensorInfo
from cpcompile.targets.requests import Added, Range, Target, parse_ranges, parse_target, parse_targets

INFO = PlanInfo(
    flavour="tensorrt-rtx",
    version="1.7.1.116",
    capabilities=("sm86", "sm120"),
    precision="fp16",
    profiles=(Profile(name="default", shapes={"ids": ((1, 1), (1, 8), (2, 64))}),),
    tensors=(TensorInfo(name="ids", is_input=True, dtype="int64", shape=("batch", 8)),),
    onnx_digest="0" * 64,
)
PLAN = Path("model.cpc/english/tensorrt-rtx-fp16/engine.plan")


def test_targets() -> None:
    assert parse_target("tensorrt") == Target("tensorrt", ())
    assert parse_target("tensorrt-rtx") == Target("tensorrt-rtx", ("sm86", "sm89", "sm120"))
    assert parse_target("tensorrt-rtx=sm120, SM86,sm120") == Target("tensorrt-rtx", ("sm120", "sm86"))
    assert str(parse_target("tensorrt-rtx=sm89")) == "tensorrt-rtx=sm89"
    for text, says in (
        ("tpu", "there is no target 'tpu'; there are cpu, tensorrt, tensorrt-rtx, cuda"),
        ("tensorrt-rtx=", "names no compute capability"),
        ("tensorrt-rtx=8.6", "'8.6' is not a compute capability; write it like sm86"),
        ("tensorrt=sm90", "builds for the GPU in this machine"),
        ("openvino=sm90", "--target openvino builds for every processor"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_target(text)


def test_ranges() -> None:
    assert parse_ranges(["batch=1:2:8", "sequence=64"]) == {"batch": Range(1, 2, 8), "sequence": Range(64, 64, 64)}
    for texts, says in (
        (["batch=8:1:1"], "--profile batch=8:1:1: write the lengths in ascending order"),
        (["batch=" + "9" * 5000], "write the lengths of an axis as name=min:opt:max"),
        (["batch=2:1:8"], "write the lengths in ascending order"),
        (["batch=1:2"], "write the lengths of an axis as name=min:opt:max"),
        (["batch=1x1:1x2:1x3"], "write the lengths"),
        (["batch=-1:1:1"], "write the lengths"),
        (["=1:1:1"], "write the lengths"),
        (["batch"], "write the lengths"),
        (["batch=1", "batch=2"], "is given twice"),
        ([f"batch=1:1:{2**40}"], "write the lengths in ascending order"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_ranges(texts)


def chosen(targets: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The precisions of each target if none are named."""
    added = parse_targets(targets, None, ())
    return [added.precisions_of(target) for target in added.targets]


def test_what_is_added() -> None:
    assert parse_targets((), None, ()) == Added()
    assert chosen(("tensorrt-rtx=sm86",)) == [("fp16",)]
    added = parse_targets(("tensorrt-rtx=sm86", "tensorrt"), ("fp32", "bf16"), ("batch=2",))
    assert [target.flavour for target in added.targets] == ["tensorrt-rtx", "tensorrt"]
    assert added.precisions == ("fp32", "bf16") and added.ranges == {"batch": Range(2, 2, 2)}
    assert chosen(("openvino",)) == [("bf16",)]
    assert chosen(("openvino", "cpu", "cuda")) == [("bf16",), ("int8",), ("fp16",)]
    assert chosen(("best", "tensorrt-rtx")) == [ROUNDED, ("fp16",)]
    assert parse_targets(("tensorrt-rtx", "cpu"), ("int4-weights", "fp16"), ()).rounded == ("int4-weights",)
    assert parse_targets(("tensorrt-rtx", "cuda"), None, ()).rounded == ()
    assert parse_targets(("best",), None, (), 60.0).candidates == ROUNDED
    for arguments, says in (
        (((), ("fp16",), ()), "--precision applies to engines that --target adds"),
        (((), None, ("batch=1",)), "--profile applies to engines that --target adds"),
        ((("tensorrt-rtx",), ("int8",), ()), "--precision 'int8' does not exist; there are fp32, fp16, bf16"),
        ((("tensorrt-rtx=sm86", "tensorrt-rtx=sm89"), None, ()), "give one per library"),
        ((("openvino",), ("fp16",), ()), "--precision 'fp16' does not exist; there are fp32, bf16"),
        ((("tensorrt",), ("int4-weights",), ()), "'int4-weights' does not exist; there are fp32, fp16, bf16"),
        ((("openvino", "cuda"), ("fp16",), ()), "--target openvino: has none of the precisions fp16"),
        ((("openvino",), None, ("batch=1",)), "--profile applies to engines for GPUs"),
        (((), None, (), 60.0), "--search-seconds applies to the search of --target best; add that target, or omit it"),
        ((("cpu",), None, (), 60.0), "--search-seconds applies to the search of --target best"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_targets(*arguments)


def test_only_what_needs_no_other_engines_is_written_after_them() -> None:
    assert parse_targets(("openvino", "best"), None, ()).independent == ()
    added = parse_targets(("cpu", "openvino", "cuda", "tensorrt"), None, ()).independent
    assert [(target.flavour, each) for target, each in added] == [
        ("cpu", "int8"),
        ("cuda", "fp16"),
        ("tensorrt", "fp16"),
    ]


def test_a_record_comes_back_from_json() -> None:
    plain = json.loads(json.dumps(INFO.to_plain()))
    assert PlanInfo.from_plain(plain) == INFO
    few = dataclasses.replace(INFO, precision="int4-weights", rounded=("embedding.weight",))
    assert PlanInfo.from_plain(json.loads(json.dumps(few.to_plain()))) == few
    assert plain["compute_capabilities"] == ["sm86", "sm120"] and len(plain["settings_digest"]) == 64


@pytest.mark.parametrize("key", list(INFO.to_plain()))
def test_a_malformed_record_is_refused(key: str) -> None:
    for wrong in (None, 5, "x", [], {}, [[1]], [{}], {"a": 1}):
        plain = INFO.to_plain() | {key: wrong}
        if (key, wrong) in (("onnx_digest", "x"), ("rounded", [])):  # what a record may say
            continue
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
            PlanInfo.from_plain(plain)


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": "1\x1b[2J"},
        {"capabilities": ("../sm86",)},
        {"precision": "fp16; rm -rf ~"},
        {"profiles": (Profile(name="default", shapes={}),)},
        {"tensors": ()},
        {"precision": "int8", "rounded": ("a",)},
        {"precision": "int4-weights"},
        {"rounded": ("a",)},
    ],
)
def test_a_record_that_was_sealed_anew_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"executor_info\.tensorrt"):
        PlanInfo.from_plain(dataclasses.replace(INFO, **wrong).to_plain())


def test_an_engine_of_another_version_or_gpu_says_what_it_is_and_how_to_build_it_again() -> None:
    INFO.require_fit(PLAN, version="1.7.1.116")
    INFO.require_fit(PLAN, version="1.7.1.116", capability="sm86")
    with pytest.raises(UsageError) as raised:
        INFO.require_fit(PLAN, version="1.8.0.1", capability="sm86")
    assert str(raised.value) == (
        f"{PLAN}: was built by tensorrt-rtx 1.7.1.116 for sm86, sm120; the installed 1.8.0.1 cannot load it. "
        "Install version 1.7.1.116, or build it again: "
        "cpcompile build MODEL --target tensorrt-rtx=sm86,sm120 --precision fp16"
    )
    with pytest.raises(UsageError) as raised:
        INFO.require_fit(PLAN, version="1.7.1.116", capability="sm89")
    assert "the GPU here is sm89; build it again" in str(raised.value)
    assert "--target tensorrt-rtx=sm86,sm120,sm89 --precision fp16" in str(raised.value)

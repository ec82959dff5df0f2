"""Bundles of somebody who means harm: every digest fits. What is damaged by chance is in test_bundle."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cpcompile.bundle.reader import Bundle, open_bundle
from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.files.external_data import references_of
from cpcompile.runtime.engine import load_engine
from tests.bundles import ARTIFACT, PLAN_INFO, reseal

ENGINE = "a/cpu-fp32/model.onnx"
SECRET = np.arange(4, dtype=np.float32)


def add_model(place: str = "initializer", **external: str) -> onnx.ModelProto:
    """logits = x + w; `w` lies where `external` says."""
    tensor = onnx.TensorProto(name="w", dims=[4], data_type=onnx.TensorProto.FLOAT, data_location=1)
    for key, value in external.items():
        tensor.external_data.add(key=key, value=value)
    nodes = [onnx.helper.make_node("Add", ["x", "w"], ["logits"])]
    if place == "constant":
        nodes.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=tensor))
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in ("x", "logits")]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], [tensor] if place == "initializer" else [])
    if place == "branch":
        inner = onnx.helper.make_graph(nodes, "then", [], values[1:], [tensor])
        condition = onnx.helper.make_tensor("c", onnx.TensorProto.BOOL, [], [True])
        node = onnx.helper.make_node("If", ["c"], ["logits"], then_branch=inner, else_branch=inner)
        graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [condition])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose engine runs, and a secret beside it."""
    (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
    return write_bundle(tmp_path / "model.cpc")


def write_bundle(target: Path) -> Path:
    artifact = dataclasses.replace(ARTIFACT, shared_bytes=16)
    with BundleWriter(target) as writer:
        for name in ("weights", "tokenizer"):
            writer.stage(name)
        (writer.root / ".weights" / "weights.bin").write_bytes(SECRET.tobytes())
        (writer.root / ".tokenizer" / "tokenizer.json").write_text("{}")
        np.save(writer.root / ".tokenizer" / "token_ids.npy", np.arange(3, dtype=np.int32))
        weights, words = (writer.add_asset(writer.root / name) for name in (".weights", ".tokenizer"))
        model = add_model(location="weights.bin", offset="0", length="16")
        (writer.folder("a", "cpu-fp32") / "model.onnx").write_bytes(model.SerializeToString())
        writer.add_variant("a", artifact, weights=weights)
        counts = {"total": 5, "kept": 3, "removed": 2, "removed_by_kind": {"ffn": 2}, "removed_experts": {}}
        more = {"shared_weights": True, "parameters": {"a": counts}, "checkpoint": "0" * 64}
        writer.seal(name="test", metadata={"tokenizers": {"a": words}} | more)
        return writer.commit()


def edit_variant(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    component = bundle / "a" / "component.json"
    body = json.loads(component.read_text())
    edit(body["variants"]["cpu-fp32"])
    component.write_text(json.dumps(body))
    reseal(bundle)


def load(bundle: Path) -> Bundle:
    opened = open_bundle(bundle)
    load_engine(opened, "a", threads=1)
    return opened


def test_what_was_sealed_runs(bundle: Path) -> None:
    engine = load_engine(open_bundle(bundle), "a", threads=1)
    assert np.array_equal(engine.outputs({"x": SECRET})["logits"], 2 * SECRET)
    open_bundle(bundle).verify_all()
    assert np.array_equal(engine.variant.graph().graph.initializers["w"].const_value.numpy(), SECRET)


@pytest.mark.parametrize("place", ["initializer", "constant", "branch"])
@pytest.mark.parametrize(
    "location",
    [
        "../../secret.bin",
        "../../../secret.bin",
        "./weights.bin",
        "{outside}/secret.bin",
        "/dev/zero",
        "*/_ORT_MEM_ADDR_/*",
        "..\\secret.bin",
        "weights.bin\0x",
        "unlisted.bin",
    ],
)
def test_weights_in_other_files_are_refused_before_they_are_opened(bundle: Path, location: str, place: str) -> None:
    model = add_model(place, location=location.format(outside=bundle.parent), offset="0", length="16")
    (bundle / ENGINE).write_bytes(model.SerializeToString())
    (weights,) = bundle.glob("shared_assets/*/weights.bin")
    os.mkfifo(weights.with_name("unlisted.bin"))  # who opens it waits for ever
    reseal(bundle)
    for check in (load, lambda path: open_bundle(path).verify_all()):
        with pytest.raises(UsageError, match="not a file of its weights"):
            check(bundle)


@pytest.mark.parametrize(
    ("external", "says"),
    [
        ({"offset": "0", "length": str(10 << 30)}, "up to 10,737,418,240 of weights.bin, which has 16"),
        ({"offset": str(10 << 30), "length": "16"}, "which has 16"),
        ({"offset": str(2**64 - 8), "length": "16"}, "which has 16"),
        ({"offset": "9" * 5000}, "64 bits"),
        ({"offset": "-16", "length": "16"}, "the offset of a tensor is '-16'"),
        ({"length": "1e1"}, "the length of a tensor"),
        ({"length": "²"}, "the length of a tensor"),
    ],
)
def test_claims_beyond_the_weights_are_refused(bundle: Path, external: dict[str, str], says: str) -> None:
    (bundle / ENGINE).write_bytes(add_model(location="weights.bin", **external).SerializeToString())
    reseal(bundle)
    with pytest.raises(UsageError, match=says):
        load(bundle)


def test_dimensions_beyond_the_weights_are_refused(bundle: Path) -> None:
    model = add_model(location="weights.bin")
    model.graph.initializer[0].dims[:] = [10 << 30]
    (bundle / ENGINE).write_bytes(model.SerializeToString())
    reseal(bundle)
    with pytest.raises(CpcompileError, match="cannot load it"):
        load(bundle)
    with pytest.raises(UsageError, match="truncated or a different one"):
        open_bundle(bundle).variant("a", "cpu-fp32").graph()


def test_every_truncation_is_a_sentence(bundle: Path) -> None:
    whole = (bundle / ENGINE).read_bytes()
    for end in range(len(whole)):
        (bundle / ENGINE).write_bytes(whole[:end])
        reseal(bundle)
        with pytest.raises(CpcompileError, match=r"model.onnx: "):
            load(bundle)


def test_references_of_a_deep_or_malformed_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for content, says in {
        b"": "empty",
        b"\x3a\x05": "truncated",
        b"\x3a" + b"\xff" * 20: "no end",
        b"\x3b": "wire type 3",
        b"\x02\x00": "number 0",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UsageError, match=says):
            references_of(path)
    deep = b""
    while len(deep) < 2000:  # If within If
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # graph of an attribute of a node of a graph
            size, length = len(deep), b""
            while size > 127:
                length, size = length + bytes([size & 127 | 128]), size >> 7
            deep = tag + length + bytes([size]) + deep
    path.write_bytes(b"\x3a" + bytes([len(deep) & 127 | 128, len(deep) >> 7]) + deep)
    with pytest.raises(UsageError, match="nested more than"):
        references_of(path)


@pytest.mark.parametrize(
    "key", ["session.custom_ops_library", "session.load_model_format", "ep.context_file_path", "session.save_profile"]
)
def test_only_known_session_options_pass(bundle: Path, key: str) -> None:
    edit_variant(bundle, lambda variant: variant["executor_info"]["ort"]["session_options"].update({key: "1"}))
    with pytest.raises(UsageError, match=f"session option '{key}', which a bundle may not set"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("provider", "key"),
    [
        ("CPUExecutionProvider", "use_tf32"),
        ("CUDAExecutionProvider", "trt_extra_plugin_lib_paths"),
        ("TensorrtExecutionProvider", "trt_extra_plugin_lib_paths"),
        ("TensorrtExecutionProvider", "trt_engine_cache_path"),
        ("NvTensorRTRTXExecutionProvider", "nv_runtime_cache_path"),
    ],
)
def test_only_known_provider_options_pass(bundle: Path, provider: str, key: str) -> None:
    def option(variant: dict[str, Any]) -> None:
        variant["ep"] = provider
        variant["executor_info"]["ort"]["provider_options"] = {key: "1"}

    edit_variant(bundle, option)
    with pytest.raises(UsageError, match=f"option '{key}' of {provider}, which a bundle may not set"):
        open_bundle(bundle)


def test_an_engine_of_another_format_is_refused(bundle: Path) -> None:
    edit_variant(bundle, lambda variant: variant["executor_info"]["ort"].update(model_file="model.ort"))
    with pytest.raises(UsageError, match="is not named .onnx"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "a\n", "\x1b[2J", "a" * 101, "é", "con\0"])
def test_names_that_are_none_are_refused(bundle: Path, name: str) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["components"][name] = manifest["components"].pop("a")

    reseal(bundle, rename)
    with pytest.raises(UsageError, match="is not a valid name"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "\ud800", "a//../../secret.bin", "/etc/passwd", ""])
def test_names_of_files_that_are_none_are_refused(bundle: Path, name: str) -> None:
    reseal(bundle, lambda manifest: manifest["additional_metadata"]["cpcompile"]["files"].update({name: "0" * 64}))
    with pytest.raises(UsageError):
        open_bundle(bundle).verify_all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "manifest.json: cannot be read as JSON"),
        ('{"components": {}, "components": {}}', "a key appears twice"),
        ('{"components": NaN}', "NaN is not valid JSON"),
        ("9" * 5000, "manifest.json: cannot be read as JSON"),
        ("\ufeff{}", "manifest.json: cannot be read as JSON"),
        ("[]", "malformed"),
    ],
    ids=["deep", "twice", "nan", "number", "mark", "list"],
)
def test_hostile_json_is_refused(bundle: Path, text: str, says: str) -> None:
    (bundle / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=says):
        open_bundle(bundle)


def test_huge_json_is_not_read(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 10 << 30)  # sparse
    with pytest.raises(UsageError, match="10,737,418,240 bytes"):
        open_bundle(bundle)


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
@pytest.mark.parametrize("name", ["manifest.json", "a/component.json", ENGINE, "weights.bin", "tokenizer.json"])
def test_a_pipe_is_not_waited_for(bundle: Path, name: str) -> None:
    (path,) = bundle.rglob(name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match=r"not a regular file|is not a bundle"):
        open_bundle(bundle).verify_all()


@pytest.mark.parametrize("name", ["manifest.json", "a", "shared_assets"])
def test_links_to_places_outside_are_refused(bundle: Path, name: str) -> None:
    (bundle / name).rename(bundle.parent / name)
    (bundle / name).symlink_to(bundle.parent / name)
    with pytest.raises(UsageError, match="leaves the bundle"):
        open_bundle(bundle).verify_all()


def test_links_within_and_links_in_a_circle(bundle: Path) -> None:
    (bundle / "a").rename(bundle / "moved")
    (bundle / "a").symlink_to("moved")
    load(bundle)
    (bundle / "a").unlink()
    (bundle / "a").symlink_to("a")
    with pytest.raises(UsageError):
        open_bundle(bundle)


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00v\x00" + header.ljust(117) + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x05\x06" + bytes(18),
        b"\x80\x04K\x05.",
        npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1342177280,), }"),
        npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }") + bytes(8),
        npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1,), }") + b"\xff" * 8,
        npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }") + bytes(8),
        npy(b"(" * 100),
    ],
    ids=["empty", "zip", "pickle", "10GB", "floats", "negative", "objects", "parentheses"],
)
def test_hostile_token_ids_are_refused(bundle: Path, content: bytes) -> None:
    opened = open_bundle(bundle)
    ids = opened.token_ids("a")
    assert ids is not None
    assert ids.tolist() == [0, 1, 2]
    next(bundle.rglob("token_ids.npy")).write_bytes(content)
    reseal(bundle)
    with pytest.raises(UsageError, match="token_ids.npy"):
        open_bundle(bundle).token_ids("a")


def test_a_context_that_the_engine_does_not_choose_is_a_sentence(bundle: Path) -> None:
    """Found by tests/fuzz."""
    edit_variant(bundle, lambda variant: variant["executor_info"]["cpcompile"].update(contexts=["a"]))
    with pytest.raises(CpcompileError, match=r"model.onnx: ONNX Runtime .* cannot run it .*context"):
        load_engine(open_bundle(bundle), "a", threads=1).outputs({"x": SECRET})


PLAN = PLAN_INFO.to_plain()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_file": "engine.plan", "version": None}, "incomplete or malformed \\(None is not text"),
        ({"model_file": "engine.plan", "flavour": "tpu"}, "incomplete or malformed"),
        (
            {"model_file": "engine.plan", "profiles": [{"name": "p", "shapes": {"x": [[-1], [1], [1]]}}]},
            "-1 is not a length",
        ),
        ({"model_file": "engine.plan", "precision": "fp32"}, "incomplete or malformed"),
        ({"model_file": "model.onnx"}, "is not named .plan"),
        ({"model_file": "../../../secret.bin"}, "leaves the bundle"),
        ({}, "incomplete or malformed \\('model_file'"),
    ],
)
def test_a_plan_that_is_described_wrongly_is_refused(bundle: Path, change: dict[str, Any], says: str) -> None:
    edit_variant(bundle, lambda variant: variant["executor_info"].update(tensorrt=PLAN | change))
    with pytest.raises(UsageError, match=says):
        open_bundle(bundle)


def test_a_plan_is_no_engine_of_onnx_runtime(bundle: Path) -> None:
    (bundle / "a" / "cpu-fp32" / "engine.plan").write_bytes(b"plan")
    edit_variant(bundle, lambda variant: variant["executor_info"].update(tensorrt=PLAN | {"model_file": "engine.plan"}))
    opened = open_bundle(bundle)
    opened.verify_all()
    with pytest.raises(UsageError, match="which ONNX Runtime does not run"):
        load_engine(opened, "a", threads=1)


def as_openvino(change: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    """Make an engine one of OpenVINO, with `change` in its record."""

    def edit(variant: dict[str, Any]) -> None:
        info = variant["executor_info"]
        weights = info["ort"]["session_options"]["session.model_external_initializers_file_folder_path"]
        info["openvino"] = {"model_file": "model.onnx", "weights": weights} | change
        info["cpcompile"]["runtime"] = "openvino"

    return edit


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": 5}, "incomplete or malformed \\(weights"),
        ({"weights": None}, "incomplete or malformed \\(weights"),
        ({"weights": "../../.."}, "leaves the bundle"),
        ({"model_file": "../../../secret.bin"}, "leaves the bundle"),
        ({"model_file": "model.xml"}, "is not named .onnx"),
        ({"session_options": {"session.disable_aot_function_inlining": "1"}}, "which a bundle may not set"),
        ({"provider_options": {"device_type": "GPU"}}, "which a bundle may not set"),
    ],
)
def test_an_openvino_engine_that_is_described_wrongly_is_refused(
    bundle: Path, change: dict[str, Any], says: str
) -> None:
    edit_variant(bundle, as_openvino(change))
    with pytest.raises(UsageError, match=says):
        open_bundle(bundle)


@pytest.mark.parametrize("location", ["../../secret.bin", "*/_ORT_MEM_ADDR_/*", "secret.bin"])
def test_an_openvino_engine_reads_its_weights_alone(bundle: Path, location: str) -> None:
    """OpenVINO takes the second for an address in memory."""
    model = add_model(location=location, offset="0", length="16")
    (bundle / "a" / "cpu-fp32" / "model.onnx").write_bytes(model.SerializeToString())
    edit_variant(bundle, as_openvino({}))
    with pytest.raises(UsageError, match="which is not a file of its weights, so it is refused"):
        load_engine(open_bundle(bundle), "a", threads=1)


def test_an_openvino_engine_without_weights_has_them_inside(bundle: Path) -> None:
    edit_variant(bundle, as_openvino({"weights": ""}))
    opened = open_bundle(bundle)
    assert opened.variant("a", "cpu-fp32").weights is None
    with pytest.raises(UsageError, match="which is not a file of its weights"):
        opened.verify_all()

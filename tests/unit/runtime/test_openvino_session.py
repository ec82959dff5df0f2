"""Engines that OpenVINO runs: the same results and sentences as in ONNX Runtime, and no file opened but their own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from cpcompile.bundle import Bundle, open_bundle
from cpcompile.bundle.artifact import Artifact
from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.runtime import Engine, load_all, load_engine, openvino_session
from cpcompile.runtime.availability import why_not_here
from cpcompile.runtime.openvino_session import OpenVinoSession, load_session
from tests.bundles import ARTIFACT

pytest.importorskip("openvino", reason="openvino is not installed: pip install 'cpcompile[openvino]'")

NAME = "openvino-fp32"
OPENVINO = replace(ARTIFACT, variant=NAME, runtime="openvino", provider="")
WEIGHTS = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 300] x, int32[1] n) => (float[batch, 4] y, float[batch, 4] same, int32[1] twice) {
        m = Cast<to = 1>(n)
        product = MatMul(x, w)
        y = Mul(product, m)
        same = Identity(y)
        twice = Add(n, n)
    }"""


def external(name: str, array: np.ndarray, **changes: Any) -> onnx.TensorProto:
    """`array` at the start of weights.bin; `changes` are made to that statement."""
    tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=1, data_location=1)
    for key, value in ({"location": "weights.bin", "offset": 0, "length": array.nbytes} | changes).items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write(folder: Path, *artifacts: Artifact, graph: str = GRAPH, dims: tuple[int, ...] = WEIGHTS.shape) -> Bundle:
    """A bundle of one context, whose engines read their one tensor from a shared file."""
    with BundleWriter(folder / "model.cpc") as writer:
        staging = writer.stage("weights")
        (staging / "weights.bin").write_bytes(WEIGHTS.tobytes())
        uri = writer.add_asset(staging)
        model = onnx.parser.parse_model(graph)
        tensor = external("w", WEIGHTS)
        tensor.dims[:] = dims
        model.graph.initializer.append(tensor)
        for artifact in artifacts:
            (writer.folder("a", artifact.variant) / "model.onnx").write_bytes(model.SerializeToString())
            writer.add_variant("a", artifact, weights=uri)
        counts = {"total": 5, "kept": 3, "removed": 2, "removed_by_kind": {}, "removed_experts": {}}
        more = {"shared_weights": True, "parameters": {"a": counts}, "checkpoint": "0" * 64, "tokenizers": {}}
        writer.seal(name="test", metadata=more)
        return open_bundle(writer.commit())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write(
        tmp_path_factory.mktemp("bundle"),
        ARTIFACT,
        OPENVINO,
        replace(OPENVINO, variant="openvino-bf16", precision="bf16"),
    )


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Engine:
    return load_engine(bundle, "a", NAME, threads=1)


def feeds(rows: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(rows).standard_normal((rows, 300)).astype(np.float32)
    return {"x": x, "n": np.array([3], dtype=np.int32)}


def test_the_record_of_an_engine_names_the_shared_weights_and_no_provider(bundle: Bundle) -> None:
    bundle.verify_all()
    cpu, here = bundle.variant("a", "cpu-fp32"), bundle.variant("a", NAME)
    assert (here.runtime, here.precision, here.provider) == ("openvino", "fp32", "")
    assert here.weights == cpu.weights and here.on_cpu and cpu.on_cpu
    body = bundle.components["a"]["variants"][NAME]
    assert body["executor_info"].keys() == {"openvino", "cpcompile"} and "ep" not in body  # ONNX Runtime skips it
    package = ort.ModelPackageContext(str(bundle.root))
    session = package.select_component("a", ort.ModelPackageOptions(ort.SessionOptions())).create_session(None)
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_outputs_are_those_of_onnx_runtime(bundle: Bundle, engine: Engine) -> None:
    """Two outputs are the same tensor, which has both names in OpenVINO."""
    other = load_engine(bundle, "a", threads=1)
    assert isinstance(engine.session, OpenVinoSession)
    for given, expected in zip(engine.session.get_inputs(), other.session.get_inputs(), strict=True):
        assert (given.name, given.type) == (expected.name, expected.type)
    for rows in (1, 5, 0):
        own, expected = engine.outputs(feeds(rows)), other.outputs(feeds(rows))
        assert list(own) == list(expected) == ["y", "same", "twice"]
        for name, array in expected.items():
            assert own[name].dtype == array.dtype
            np.testing.assert_allclose(own[name], array, rtol=1e-5, atol=1e-4)


def test_outputs_of_one_run_stay_when_the_next_one_comes(engine: Engine) -> None:
    first = engine.outputs(feeds(2))["y"]
    before = first.copy()
    engine.outputs(feeds(3))
    engine.outputs({name: array * 2 for name, array in feeds(2).items()})
    np.testing.assert_array_equal(first, before)


def test_threads_get_what_a_single_one_gets(bundle: Bundle) -> None:
    session = load_session(bundle.variant("a", NAME), threads=1, streams=2)
    many = [feeds(1 + number % 7) for number in range(60)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: session.run(["y"], each)[0], many))
    for given, found in zip(many, together, strict=True):
        np.testing.assert_allclose(found, 3 * given["x"] @ WEIGHTS, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"x": [[1.0]], "n": [1]}, r"x has the shape \(1, 1\); \(any, 300\) is needed"),
        ({"x": np.zeros((1, 300)), "n": [1.5]}, "n is float64; int32 is needed"),
        ({"x": np.zeros((1, 300))}, "needs its inputs by name, x, n; given: x"),
    ],
)
def test_wrong_inputs_are_a_sentence(engine: Engine, given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        engine.outputs(given)


def test_what_openvino_refuses_is_a_sentence(engine: Engine) -> None:
    with pytest.raises(CpcompileError, match=r"openvino-fp32/model.onnx: OpenVINO cannot run it on these inputs: \S"):
        engine.session.run(["y"], {"x": np.zeros((1, 4), dtype=np.float32), "n": np.zeros(1, dtype=np.int32)})


def test_a_graph_that_openvino_does_not_know_is_a_sentence(tmp_path: Path) -> None:
    graph = GRAPH.replace('["" : 20]', '["" : 20, "own" : 1]').replace("Identity(", "own.Thing(")
    bundle = write(tmp_path, OPENVINO, graph=graph)
    with pytest.raises(CpcompileError, match=r"model.onnx: OpenVINO \S+ cannot compile it: .*Thing"):
        load_engine(bundle, "a", NAME)


@pytest.mark.parametrize("dims", [(300, 5), (300, 3), (300, 1 << 40)])
def test_a_tensor_that_is_longer_or_shorter_than_its_shape_is_refused(tmp_path: Path, dims: tuple[int, ...]) -> None:
    bundle = write(tmp_path, OPENVINO, dims=dims)
    with pytest.raises(CpcompileError, match=r"model.onnx: OpenVINO \S+ cannot compile it: w is not as long as"):
        load_engine(bundle, "a", NAME)


def test_a_precision_that_openvino_does_not_have_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path, replace(OPENVINO, precision="fp8"))
    with pytest.raises(UsageError, match="OpenVINO does not compute in 'fp8'"):
        load_engine(bundle, "a", NAME)


def test_without_bfloat16_the_engine_is_not_run_in_float32(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_session, "_has_bf16", lambda _library: False)
    assert why_not_here(bundle.variant("a", NAME)) is None
    assert why_not_here(bundle.variant("a", "openvino-bf16")) == "this processor has no instructions for bfloat16"
    with pytest.raises(CpcompileError, match=r"model.onnx: this processor has no instructions for bfloat16$"):
        load_engine(bundle, "a", "openvino-bf16")


def test_a_fall_back_to_float32_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not_here(bundle.variant("a", "openvino-bf16")) is None:
        pytest.skip("this processor has bfloat16")
    monkeypatch.setattr(openvino_session, "_has_bf16", lambda _library: True)
    with pytest.raises(CpcompileError, match="OpenVINO would compute in f32 here; choose openvino-fp32"):
        load_engine(bundle, "a", "openvino-bf16")


@pytest.mark.parametrize(
    "opened", [lambda bundle: load_engine(bundle, "a", NAME), lambda bundle: load_session(bundle.variant("a", NAME))]
)
def test_without_openvino_the_extra_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, opened: Callable[[Bundle], object]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    says = "openvino is not installed: pip install 'cpcompile[openvino]'"
    assert why_not_here(bundle.variant("a", NAME)) == says
    with pytest.raises(CpcompileError) as raised:
        opened(bundle)
    assert str(raised.value) == f"{bundle.variant('a', NAME).model}: {says}"


def test_an_openvino_that_cannot_be_imported_says_why(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError('libopenvino.so: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "openvino")
    monkeypatch.syspath_prepend(tmp_path)
    reason = why_not_here(bundle.variant("a", NAME))
    assert reason == "openvino cannot be imported (libopenvino.so: cannot open shared object file)"


def test_many_contexts_in_one_process_are_refused(bundle: Bundle) -> None:
    with load_all(bundle, NAME) as engines, pytest.raises(UsageError, match="load_all shares the weights of"):
        engines["a"]

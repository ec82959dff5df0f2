"""Quantised weights count as what they stand for, and their zero channels go or are explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime.quantization as quantization
import pytest
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from cpcompile.files.onnx_file import load_onnx, size_of
from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels, Elimination
from cpcompile.passes.fold_constants import FoldConstants
from cpcompile.pipeline.compare import compare_models
from cpcompile.pipeline.optimize import optimize_file
from tests.unit.passes.graph_text import Array, parse

DEAD, PARAMETERS = 32, 32 * 64 + 64 + 64 * 32 + 32
Quantize = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of which every second hidden channel is zero."""
    rng = np.random.default_rng(0)
    weights = {"a": (32, 64), "c": (64,), "b": (64, 32), "d": (32,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    arrays["a"][:, ::2] = arrays["c"][::2] = 0
    model = parse(
        """(float[N,32] x) => (float[N,32] y) {
            h = MatMul(x, a) k = Add(h, c) r = Relu(k) m = MatMul(r, b) y = Add(m, d) }""",
        arrays,
        opset=21,
    )
    path = tmp_path_factory.mktemp("quantized") / "float.onnx"
    ir.save(model, path)
    return path


class Data(quantization.CalibrationDataReader):
    """Two batches."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.batches = iter([{"x": rng.standard_normal((4, 32)).astype(np.float32)} for _ in range(2)])

    def get_next(self) -> dict[str, Array] | None:
        """The next batch, if there is one."""
        return next(self.batches, None)


def dynamic(**settings: object) -> Quantize:
    return lambda source, out: quantization.quantize_dynamic(source, out, **settings)


def static(form: str, weights: str, **settings: object) -> Quantize:
    kind, types = quantization.QuantFormat[form], quantization.QuantType
    return lambda source, out: quantization.quantize_static(
        source, out, Data(), quant_format=kind, weight_type=types[weights], activation_type=types.QUInt8, **settings
    )


def packed(symmetric: bool) -> Quantize:
    def quantize(source: Path, out: Path) -> None:
        made = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=symmetric)
        made.process()
        made.model.save_model_to_file(str(out))

    return quantize


@pytest.mark.parametrize(
    ("quantize", "operator"),
    [
        (dynamic(), "MatMulInteger"),
        (dynamic(per_channel=True, weight_type=quantization.QuantType.QUInt8), "MatMulInteger"),
        (static("QOperator", "QInt8"), "QLinearMatMul"),
        (static("QOperator", "QUInt8", per_channel=True), "QLinearMatMul"),
        (static("QDQ", "QUInt8", per_channel=True), None),
        (static("QDQ", "QInt4"), None),
        (packed(symmetric=True), "MatMulNBits"),
        (packed(symmetric=False), "MatMulNBits"),
    ],
)
def test_every_form_counts_alike_and_shows_its_zeros(
    source: Path, tmp_path: Path, quantize: Quantize, operator: str | None
) -> None:
    path, out = tmp_path / "quantized.onnx", tmp_path / "out.onnx"
    quantize(source, path)
    before, after = size_of(load_onnx(source)), size_of(load_onnx(path))
    assert before.parameters == after.parameters == PARAMETERS
    assert after.bytes < before.bytes / 3
    assert compare_models(source, path).candidate.parameters == PARAMETERS
    result = optimize_file(path, out)
    if operator is None:
        assert result.steps[-1].size.parameters <= PARAMETERS - DEAD * (32 + 32 + 1)
    else:
        stuck = [(b.channels, b.operator, b.reason) for b in result.blocked]
        assert stuck == [(DEAD, operator, f"there is no rule for {operator}")]


CONV = """(uint8[N,2,4,4] x) => (int32[N,6,2,2] y) { y = ConvInteger (x, w, p, q) }"""


@pytest.mark.parametrize(("points", "zero"), [(0, 0), (3, 3), ([0, 3, 0, 0, 3, 0], 3)])
def test_a_zero_is_what_equals_its_zero_point(points: object, zero: int) -> None:
    """Of six kernels the second and the fifth are zero."""
    weight = np.random.default_rng(0).integers(4, 9, (6, 2, 3, 3)).astype(np.int8)
    weight[[1, 4]] = zero
    given = {"w": weight, "p": np.array(0, np.uint8), "q": np.array(points, np.int8)}
    result = EliminateDeadChannels()(parse(CONV, given))
    assert isinstance(result, Elimination)
    assert [(b.value, b.axis, b.channels) for b in result.blocked] == [("w", 0, 2)]


@pytest.mark.parametrize(
    ("text", "weights", "parameters"),
    [
        ("h = DequantizeLinear <axis = 1> (w, s) y = MatMul(x, h)", {"w": np.int16, "s": 3}, 12),
        ("i = Gather(w, at) j = Cast <to = 1> (i) y = Add(j, x)", {"w": np.int8, "at": [0, 1, 2]}, 12),
        ("j = Gather(w, at) y = Add(j, x)", {"w": np.float32, "at": [0, 1, 2]}, 12),
        ("j = Reshape(x, at) y = Cast <to = 1> (j)", {"at": [0, 3]}, 0),
    ],
)
def test_what_is_a_parameter(text: str, weights: dict[str, object], parameters: int) -> None:
    arrays: dict[str, Array] = {}
    for name, given in weights.items():
        if name == "w":
            arrays[name] = np.ones((4, 3), dtype=given)  # type: ignore[call-overload]
        else:
            arrays[name] = np.ones(given, np.float32) if isinstance(given, int) else np.array(given)
    model = parse(f"(float[3,4] x) => (float[A,B] y) {{ {text} }}", arrays, infer=False)
    assert size_of(model).parameters == parameters


def forms(model: ir.Model) -> Sequence[str]:
    return [node.op_type for node in model.graph]


def test_a_quantised_weight_is_not_unpacked_by_folding() -> None:
    text = "(float[N,4] x) => (float[N,3] y) { c = Cast <to = 1> (w) d = Mul(c, s) y = MatMul(x, d) }"
    model = parse(text, {"w": np.ones((4, 3), np.int8), "s": np.array(0.5)})
    FoldConstants()(model)
    assert forms(model) == ["Cast", "Mul", "MatMul"]

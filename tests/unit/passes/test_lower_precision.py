"""Before and expected graphs with their types, and values with every tensor of half precision rounded to it."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.core.errors import CpcompileError
from cpcompile.passes.freeze import freeze
from cpcompile.passes.lower_precision import HALVES, LowerPrecision
from tests.unit.passes.conftest import Captured
from tests.unit.passes.graph_text import Weights, canonical, check, inputs_of, parse, run
from tests.unit.passes.half_values import run_rounded

EPSILON = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""Relative rounding error of one number."""


def lower(model: ir.Model, precision: str = "fp16") -> ir.Model:
    """`model` in half precision, checked: valid, the same interface, nothing left for a second run."""
    before = [(v.name, v.dtype, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)]
    assert LowerPrecision(precision)(model).modified
    check(model)
    assert [(v.name, v.dtype, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)] == before
    assert not LowerPrecision(precision)(model).modified
    return model


def assert_near(before: ir.Model, after: ir.Model, precision: str, roundings: int) -> None:
    feeds = inputs_of(before)
    expected, got = run(before, feeds), run_rounded(after, feeds)
    assert list(expected) == list(got)
    for name, array in expected.items():
        error = np.abs(got[name].astype(np.float64) - array).max()
        assert 0 < error <= roundings * EPSILON[precision] * np.abs(array).max(), name


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("before", "expected", "weights"),
    [
        pytest.param(
            "(float[N,8] x) => (float[N,4] y) { a = MatMul(x, w) b = Relu(a) y = Add(b, c) }",
            """(float[N,8] x) => (float[N,4] y) {
                x_h = Cast<to=H>(x) a = MatMul(x_h, w) b = Relu(a) y_h = Add(b, c) y = Cast<to=1>(y_h) }""",
            {"w": (8, 4), "c": (4,)},
            id="a product, and what follows it",
        ),
        pytest.param(
            "(float[N,8] x) => (float[N,8] y) { a = MatMul(x, w) s = Softmax(a) y = MatMul(s, w) }",
            """(float[N,8] x) => (float[N,8] y) {
                x_h = Cast<to=H>(x) a = MatMul(x_h, w) a_f = Cast<to=1>(a) s = Softmax(a_f) s_h = Cast<to=H>(s)
                y_h = MatMul(s_h, w) y = Cast<to=1>(y_h) }""",
            {"w": (8, 8)},
            id="softmax in float32",
        ),
        pytest.param(
            """(float[N,8] x) => (float[N,8] y) { a = MatMul(x, w)
                q = Pow(a, p) m = ReduceMean(q, axis) e = Add(m, small) r = Sqrt(e) n = Div(a, r) y = MatMul(n, w) }""",
            """(float[N,8] x) => (float[N,8] y) { x_h = Cast<to=H>(x) a = MatMul(x_h, w) a_f = Cast<to=1>(a)
                q = Pow(a_f, p) m = ReduceMean(q, axis) e = Add(m, small) r = Sqrt(e) n = Div(a_f, r)
                n_h = Cast<to=H>(n) y_h = MatMul(n_h, w) y = Cast<to=1>(y_h) }""",
            {"w": (8, 8), "p": np.array(2.0), "axis": np.int64([-1]), "small": np.array(1e-9)},
            id="a norm that is spelled out, with an epsilon that float16 does not have",
        ),
        pytest.param(
            "(int64[N,S] i) => (float[N,S,8] y) { a = Gather(w, i) b = Mul(a, c) y = MatMul(b, m) }",
            """(int64[N,S] i) => (float[N,S,8] y) {
                a = Gather(w, i) b = Mul(a, c) y_h = MatMul(b, m) y = Cast<to=1>(y_h) }""",
            {"w": (2, 8), "c": (8,), "m": (8, 8)},
            id="an embedding",
        ),
        pytest.param(
            """(float[N,8] x) => (float[N,8] y) { a = MatMul(x, w) b = RMSNormalization(a, g) c = Add(a, b)
                d = Transpose<perm=[1, 0]>(w) y = MatMul(c, d) }""",
            """(float[N,8] x) => (float[N,8] y) { x_h = Cast<to=H>(x) a = MatMul(x_h, w) a_f = Cast<to=1>(a)
                b = RMSNormalization(a_f, g) c = Add(a_f, b) c_h = Cast<to=H>(c)
                d = Transpose<perm=[1, 0]>(w) y_h = MatMul(c_h, d) y = Cast<to=1>(y_h) }""",
            {"w": (8, 8), "g": (8,)},
            id="float32 wins where both meet, and a tied weight is stored once",
        ),
    ],
)
def test_before_and_expected(before: str, expected: str, weights: Weights, precision: str) -> None:
    after = lower(parse(before, weights), precision)
    own = repr(canonical(after)).replace(f".{HALVES[precision].short_name()}", "_h").replace(".f32", "_f")
    text = expected.replace("<to=H>", f"<to={HALVES[precision].value}>")
    assert own == repr(canonical(parse(text, weights, infer=False)))
    assert_near(parse(before, weights), after, precision, 8)


def test_a_constant_beyond_the_range_keeps_its_node() -> None:
    text = "(float[N,8] x, bool[N,8] m) => (float[N,8] y) { a = MatMul(x, w) b = Where(m, a, low) y = Softmax(b) }"
    weights = {"w": (8, 8), "low": np.array(-3.4e38)}
    dtypes = {node.op_type: node.outputs[0].dtype for node in lower(parse(text, weights)).graph}
    assert (dtypes["MatMul"], dtypes["Where"]) == (ir.DataType.FLOAT16, ir.DataType.FLOAT)
    dtypes = {node.op_type: node.outputs[0].dtype for node in lower(parse(text, weights), "bf16").graph}
    assert dtypes["Where"] == ir.DataType.BFLOAT16
    infinite = {"w": (8, 8), "low": np.array(-np.inf)}  # half precision has that
    dtypes = {node.op_type: node.outputs[0].dtype for node in lower(parse(text, infinite)).graph}
    assert dtypes["Where"] == ir.DataType.FLOAT16


def test_positions_stay_exact() -> None:
    """Angles of rotary embeddings, also where a product makes them."""
    text = """(int64[S,1] i, float[S,8] x) => (float[S,8] y) { p = Cast<to=1>(i) q = Identity(p) f = Expand(freq, shape)
        a = MatMul(q, f) c = Cos(a) b = MatMul(x, w) y = Mul(b, c) }"""
    after = lower(parse(text, {"w": (8, 8), "freq": (1, 8), "shape": np.int64([1, 8])}), "bf16")
    dtypes = {node.outputs[0].name: node.outputs[0].dtype for node in after.graph}
    assert dtypes["a"] == dtypes["c"] == dtypes["y"] == ir.DataType.FLOAT
    assert dtypes["b"] == ir.DataType.BFLOAT16


def test_an_operator_that_is_not_in_the_type_stays() -> None:
    text = "(float[N,8] x) => (float[N,2] y) { a = MatMul(x, w) y, z = TopK(a, k) }"
    weights = {"w": (8, 8), "k": np.int64([2])}
    for precision, dtype in (("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.FLOAT)):
        after = lower(parse(text, weights), precision)
        topk = next(node for node in after.graph if node.op_type == "TopK")
        assert topk.outputs[0].dtype == dtype  # the standard has TopK in float16, not in bfloat16


def test_subgraphs_stay_in_float32() -> None:
    text = """(float[N,8] x, bool c) => (float[N,8] y) { a = MatMul(x, w) y = If(c)<
        then_branch = t () => (float[N,8] b) { b = MatMul(a, w) },
        else_branch = e () => (float[N,8] d) { d = Exp(a) }> }"""
    before = parse(text, {"w": (8, 8)})
    after = lower(before.clone())
    dtypes = {node.outputs[0].name: node.outputs[0].dtype for graph in after.graphs() for node in graph}
    assert dtypes["a"] == ir.DataType.FLOAT16
    assert dtypes["b"] == dtypes["d"] == dtypes["y"] == ir.DataType.FLOAT
    assert_near(before, after, "fp16", 8)


def test_quantised_weights_dequantise_to_the_type() -> None:
    text = "(float[N,8] x) => (float[N,4] y) { d = DequantizeLinear(w, s) y = MatMul(x, d) }"
    before = parse(text, {"w": np.ones((8, 4), np.int8), "s": np.array(0.1)})
    after = lower(before.clone())
    dequantised = next(node for node in after.graph if node.op_type == "DequantizeLinear")
    assert dequantised.outputs[0].dtype == ir.DataType.FLOAT16
    assert_near(before, after, "fp16", 8)


def test_a_weight_that_both_read_is_there_in_both_types() -> None:
    text = "(float[N,8] x) => (float[N,8] y, float[8,8] e) { y = MatMul(x, w) e = Exp(w) }"
    before = parse(text, {"w": (8, 8)})
    after = lower(before.clone())
    assert {n: v.dtype.name for n, v in after.graph.initializers.items()} == {"w": "FLOAT", "w.f16": "FLOAT16"}
    feeds = inputs_of(before)
    np.testing.assert_allclose(run(before, feeds)["e"], run_rounded(after, feeds)["e"], rtol=1e-6)


def test_the_original_stays_as_it_is() -> None:
    before = parse("(float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", {"w": (8, 8)})
    lower(before.clone())
    assert canonical(before) == canonical(parse("(float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", {"w": (8, 8)}))
    assert before.graph.outputs[0].dtype == before.graph.initializers["w"].dtype == ir.DataType.FLOAT


def test_values_without_a_type_are_an_error() -> None:
    model = parse("(float[N,8] x) => (float[N,8] y) { a = other.Thing(x) y = Relu(a) }", infer=False)
    with pytest.raises(CpcompileError, match="'a' has no type; infer shapes first"):
        LowerPrecision("fp16")(model)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("opset", [pytest.param(20, marks=pytest.mark.slow), 23])
def test_a_frozen_decoder(captured: Callable[[int, bool], Captured], opset: int, precision: str) -> None:
    """Half of the bytes, norms and softmax in float32, logits within a few roundings of the largest."""
    frozen = freeze(captured(opset, True).model, 0).model
    after = lower(frozen.clone(), precision)
    half = HALVES[precision]
    for node in after.graph:
        if node.op_type in ("RMSNormalization", "ReduceMean", "Softmax", "Cos"):
            assert node.outputs[0].dtype == ir.DataType.FLOAT
        if node.op_type in ("MatMul", "Attention", "Gather") and node.outputs[0].dtype != ir.DataType.INT64:
            assert node.outputs[0].dtype == half, node.name
    large = [v for v in after.graph.initializers.values() if v.const_value is not None and v.const_value.size > 1000]
    assert large and all(value.dtype == half for value in large)
    assert {v.name for v in large} <= frozen.graph.initializers.keys()
    assert all(node.metadata_props for node in after.graph if node.op_type == "Cast" and node.name.startswith("linear"))
    feeds = {"input_ids": np.random.default_rng(0).integers(0, 512, (2, 24))}
    expected, got = run(frozen, feeds)["logits"], run_rounded(after, feeds)["logits"]
    assert 0 < np.abs(got - expected).max() <= 20 * EPSILON[precision] * np.abs(expected).max()

"""What a file claims about its values is checked against what their operators make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpcompile.passes.infer_shapes import Inference, InferShapes
from cpcompile.pipeline.optimize import DEFAULT, apply_pass, parse_pass, prepare
from tests.unit.passes.graph_text import assert_same_values, check, parse

WEIGHTS = {"w": (4, 6), "g": np.array([1, 0, 2, 0, 0, 3.0]), "v": (6, 3), "two": np.array([0, 2, 3])}
BODY = "h = MatMul(x, w) z = Mul(h, g) c = Concat <axis = 0> (z, z) y = MatMul(c, v)"


def contradictions(claims: str, *, rows: str = "2", output: str = "float[R,3] y") -> tuple[ir.Model, tuple[str, ...]]:
    weights = {name: weight for name, weight in WEIGHTS.items() if f"{name})" in BODY}
    model = parse(f"(float[{rows},4] x) => ({output}) <{claims}> {{ {BODY} }}", weights, infer=False)
    result = InferShapes()(model)
    assert isinstance(result, Inference)
    assert not InferShapes()(model).modified
    return model, result.contradictions


@pytest.mark.parametrize(
    ("claims", "rows", "says"),
    [
        ("float[2,6] c", "2", "c is declared as FLOAT[2,6], its operator makes FLOAT[4,6]"),
        ("float[2,5] h", "2", "h is declared as FLOAT[2,5], its operator makes FLOAT[2,6]"),
        ("float[12] h", "2", "h is declared as FLOAT[12], its operator makes FLOAT[2,6]"),
        ("int64[2,6] h", "2", "h is declared as INT64[2,6], its operator makes FLOAT[2,6]"),
        ("float[1,6] z", "N", "z is declared as FLOAT[1,6], its operator makes FLOAT[N,6]"),
        ("float[N,6] c", "N", "c is declared as FLOAT[N,6], its operator makes FLOAT[?,6]"),
        ("float[N,N] z", "N", "z is declared as FLOAT[N,N], its operator makes FLOAT[N,6]"),
    ],
)
def test_the_operators_win(claims: str, rows: str, says: str) -> None:
    model, found = contradictions(claims, rows=rows)
    assert list(found) == [says]
    check(model)
    shapes = {out.name: str(out.shape) for node in model.graph for out in node.outputs}
    assert shapes["h"] == shapes["z"] == f"[{rows},6]"


@pytest.mark.parametrize("claims", ["float[2,6] h", "float[A,B] h", "float[2,6] c", "float[R,6] c"])
def test_what_may_be_true_is_believed(claims: str) -> None:
    _, found = contradictions(claims, rows="2" if "[2,6] h" in claims else "N")
    assert not found or claims == "float[2,6] c"


def test_an_output_that_is_declared_wrongly_is_corrected_and_others_keep_their_names() -> None:
    model, found = contradictions("float[2,6] h", rows="N", output="float[R,3] y, float[M,6] z")
    assert len(found) == 1
    assert [str(value.shape) for value in model.graph.outputs] == ["[R,3]", "[M,6]"]
    model, found = contradictions("float[N,6] h", rows="N", output="float[R,7] y")
    assert len(found) == 1
    assert model.graph.outputs[0].shape is not None
    assert model.graph.outputs[0].shape[1] == 3


def test_a_file_that_is_wrong_once_is_not_believed_elsewhere() -> None:
    """The length of r depends on values, so nothing contradicts it, but h is wrong."""
    text = """(float[N,4] x, int64[2] to) => (float[R,S] y) <float[N,5] h, float[N,6] r> {
        h = MatMul(x, w) r = Reshape(h, to) y = Neg(r) }"""
    model = parse(text, {"w": (4, 6)}, infer=False)
    InferShapes()(model)
    r = model.graph[1].outputs[0]
    assert r.shape is None or not any(isinstance(length, int) or length.value == "N" for length in r.shape)


LOOPS = """(float[2,4] x, int64 n) => (float[A,B] y) <%s> {
    u = Loop(n, , x) <body = b (int64 i, bool on, float[2,4] s) => (bool go, float[P,Q] t) { go = Identity(on)
        t = Tanh(s) }>
    h = MatMul(u, w) t = Tanh(h) y = Neg(t) }"""
"""Inference does not follow the loop, because its body could change the shape."""


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ("float[2,4] u, float[2,6] h, float[2,6] t", []),
        ("float[2,4] u, float[2,7] h", ["h is declared as FLOAT[2,7], its operator makes FLOAT[2,6]"]),
        ("float[2,6] h, float[3,6] t", ["t is declared as FLOAT[3,6], its operator makes FLOAT[2,6]"]),
        (
            "float[2,6] h, float[6] t",  # and so y would have one axis
            [
                "t is declared as FLOAT[6], its operator makes FLOAT[2,6]",
                "y is declared as FLOAT[A,B], its operator makes FLOAT[6]",
            ],
        ),
    ],
)
def test_claims_that_contradict_each_other_are_not_believed(claims: str, says: list[str]) -> None:
    model = parse(LOOPS % claims, {"w": (4, 6)}, infer=False)
    result = InferShapes()(model)
    assert isinstance(result, Inference)
    assert list(result.contradictions) == says
    check(model)
    t = next(out for node in model.graph for out in node.outputs if out.name == "t")
    assert (str(t.shape) == "[2,6]") == (not says)


def test_a_length_that_inference_leaves_open_is_compared_with_the_claims_before_it() -> None:
    text = """(float[N,M] x, int64[2] to) => (float[A,B] y) <float[2,4] r, float[9,6] h> {
        r = Reshape(x, to) h = MatMul(r, w) y = Neg(h) }"""
    model = parse(text, {"w": (4, 6)}, infer=False)
    result = InferShapes()(model)
    assert isinstance(result, Inference)
    assert list(result.contradictions) == ["h is declared as FLOAT[9,6], its operator makes FLOAT[?,6]"]


LIES = st.sampled_from([[2, 6], [4, 6], [6], [1, 2, 6], ["N", 6], [8, 3], ["N", "N"], []])


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(LIES, min_size=5, max_size=5), st.sampled_from([2, "N"]))
def test_values_stay_whatever_the_file_claims(lies: list[list[int | str]], rows: int | str) -> None:
    text = """(float[%s,4] x) => (float[R,3] y) { h = MatMul(x, w) z = Mul(h, g) r = Reshape(z, two)
        f = Flatten(r) c = Concat <axis = 0> (f, z) y = MatMul(c, v) }"""
    before = parse(text % rows, WEIGHTS, infer=False)
    after = before.clone()
    for node, lie in zip(list(after.graph)[:-1], lies, strict=True):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(lie)
    prepare(after, Path("lies.onnx"))
    for name in DEFAULT:
        apply_pass(parse_pass(name), after, Path("lies.onnx"), name)
    check(after)
    assert after.graph.initializers["w"].const_value.size < 24
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}
    assert_same_values(before, after, feeds)


def test_an_initializer_is_what_it_holds() -> None:
    """Before IR 4 weights were inputs too, with a symbolic shape, or none."""
    text = "(float[N,4] x, float[A,B] w, float[] v) => (float[N,3] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    model = onnx.parser.parse_model(f'<ir_version: 3, opset_import: ["" : 13]> g {text}')
    for name in ("w", "v"):
        array = np.ones(WEIGHTS[name], np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model.graph.input[2].type.tensor_type.ClearField("shape")
    parsed = ir.from_proto(model)
    prepare(parsed, Path("old.onnx"))
    assert [value.name for value in parsed.graph.inputs] == ["x"]
    assert {name: str(value.shape) for name, value in parsed.graph.initializers.items()} == {"w": "[4,6]", "v": "[6,3]"}


def test_the_counter_of_a_loop_stays_a_scalar_where_claims_are_dropped() -> None:
    """ONNX Runtime refuses a body whose counter has no shape."""
    text = """(float[2,4] x) => (float[2,4] y) <float[9,9] z> { z = Neg(x) y = Loop(n, , z) <body = b
        (int64 i, bool on, float[2,4] s) => (bool go, float[2,4] t) { go = Identity(on) t = Tanh(s) }> }"""
    after = parse(text, {"n": np.array(2)}, infer=False)
    result = InferShapes()(after)
    assert isinstance(result, Inference) and len(result.contradictions) == 1
    assert_same_values(parse(text.replace("<float[9,9] z>", ""), {"n": np.array(2)}, infer=False), after)


def test_a_claim_is_checked_where_only_one_length_of_a_symbolic_axis_fits() -> None:
    """Inference skips the product if A is another number than 4, but knows that it has 6 columns."""
    text = "(float[N,A] x) => (float[N,6] y) <float[2,3] h> { h = MatMul(x, w) y = Tanh(h) }"
    model = parse(text, {"w": (4, 6)}, infer=False)
    result = InferShapes()(model)
    assert isinstance(result, Inference)
    assert list(result.contradictions) == ["h is declared as FLOAT[2,3], its operator makes FLOAT[N,6]"]

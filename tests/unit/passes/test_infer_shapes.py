"""Inference adds types and shapes, and changes none that the model says."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.passes.infer_shapes import InferShapes
from cpcompile.passes.onnx_inference import SMALL
from tests.unit.passes.graph_text import Weights, assert_same_values, check, inputs_of, parse, run


def inferred(text: str, weights: Weights | None = None, *, opset: int = 23) -> dict[str, ir.Value]:
    """The values of all graphs by name, after a first run that found something and a second that did not."""
    model = parse(text, weights, opset=opset, infer=False)
    interface = [(v.name, v.type, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
    assert InferShapes()(model).modified
    assert not InferShapes()(model).modified
    check(model)
    assert_same_values(parse(text, weights, opset=opset, infer=False), model)
    assert [(v.name, v.type, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)] == interface
    return {out.name or "": out for graph in model.graphs() for node in graph for out in node.outputs}


def test_what_follows_from_the_inputs_is_added() -> None:
    values = inferred(
        "(float[N,4] x) => (float[N,2] y) { "
        "h = MatMul(x, w) s = Reshape(h, to) r = Reshape(s, back) y = MatMul(r, v) }",
        {"w": (4, 600), "to": np.array([0, 6, 100]), "back": np.array([0, 600]), "v": (600, 2)},
    )
    assert str(values["s"].shape) == "[N,6,100]"
    assert values["r"].dtype == ir.DataType.FLOAT
    assert SMALL < 4 * 600 * 4  # the shape of a weight whose content inference does not see


def test_a_list_stays_a_list() -> None:
    text = """(float[N,8] x) => (float[N,4] y) {
        list = SplitToSequence <axis = 1> (x, half) other = Identity(list) y = SequenceAt(other, one) }"""
    values = inferred(text, {"half": np.array(4), "one": np.array(1)})
    assert values["list"].type == values["other"].type == ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))


def test_names_of_the_axes_of_an_output_stay_and_inside_a_number_is_better() -> None:
    text = "(float[N,4] x) => (float[N,M] y) <float[A,B] h> { h = MatMul(x, w) y = Relu(h) }"
    values = inferred(text, {"w": (4, 6)})
    assert str(values["h"].shape) == "[A,6]"
    assert str(values["y"].shape) == "[N,M]"


def test_nothing_follows_from_a_default() -> None:
    text = "(float[2,3] x, int64[2] to) => (float[A,B] y) { h = Reshape(x, to) y = Relu(h) }"
    model = parse(text, {"to": np.array([3, 2])}, infer=False)
    InferShapes()(model)
    h = model.graph[0].outputs[0]
    assert h.shape is None or not h.shape.is_static()
    assert list(model.graph.initializers) == ["to"]
    x = np.zeros((2, 3), np.float32)
    assert run(model, {"x": x, "to": np.array([1, 6])})["y"].shape == (1, 6)


def test_inference_that_is_at_a_loss_is_not_believed() -> None:
    """onnx says that the parts of a Split of 5 into 4 are 2, 2, 2 and -1 long."""
    text = """(float[5] x, bool c) => (float[R] y) {
        y = If (c) <
            then_branch = one () => (float[R] a) {
                p, q, r, s = Split <num_outputs = 4> (x) a = Concat <axis = 0> (p, q) },
            else_branch = two () => (float[R] b) { b = Relu(x) }
        >
    }"""
    model = parse(text, infer=False)
    InferShapes()(model)
    lengths = [d for g in model.graphs() for n in g for out in n.outputs for d in (out.shape or ())]
    assert lengths
    assert all(length >= 0 for length in lengths if isinstance(length, int))
    feeds = {**inputs_of(model), "c": np.array(False)}
    assert run(model, feeds)["y"].shape == (5,)


def test_what_a_loop_takes_in_gets_a_shape() -> None:
    text = """(float[N,4] x) => (float[N,4] y) {
        y = Loop (two, , x) <body = g (int64 i, bool go, float[N,4] s) => (bool on, float[N,4] t) {
            on = Identity(go) h = MatMul(s, w) t = Relu(h) }>
    }"""
    values = inferred(text, {"two": np.array(2), "w": (4, 4)})
    assert str(values["h"].shape) == "[N,4]"


def test_an_old_opset_is_inferred_without_the_table() -> None:
    text = "(float[N,4] x) => (float[N,4] y) { h = Slice <axes = [1], starts = [0], ends = [4]> (x) y = Relu(h) }"
    values = inferred(text, opset=9)
    assert str(values["h"].shape) == "[N,4]"


def test_inference_that_fails_says_so_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = parse("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", infer=False)
    del model.graph.opset_imports[""]
    with caplog.at_level(logging.WARNING):
        assert not InferShapes()(model).modified
    assert "shapes cannot be inferred" in caplog.text

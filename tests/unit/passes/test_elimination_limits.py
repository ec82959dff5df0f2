"""Where elimination has to stop, what it says then, and what it does to graphs that are wholly dead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels
from cpcompile.passes.opset import OpsetError
from cpcompile.pipeline.optimize import Skipped, apply_pass
from tests.unit.passes.graph_text import (
    assert_becomes,
    assert_same_values,
    blocked_by,
    canonical,
    eliminate,
    parse,
    tensor,
    whole,
)

GATE = np.array([1.0, 0.0, 2.0, 0.0])
GATED = "(float[N,3] x) => (float[N,2] y) { h = MatMul(x, a) z = Mul(h, g) NODE y = MatMul(w, b) }"
WEIGHTS = {"a": (3, 4), "g": GATE, "b": (4, 2)}
INPUT = "it is an input or output of the model"
ALL = None


def test_an_unknown_operator_blocks_by_name() -> None:
    (only,) = whole(GATED.replace("NODE", "w = CumSum(z, one)"), {**WEIGHTS, "one": np.array(1)}, ["a", "g", "b"])
    assert (only.value, only.axis, only.channels) == ("z", 1, 2)
    assert (only.operator, only.reason) == ("CumSum", "there is no rule for CumSum")


def test_an_operator_of_another_domain_blocks_even_if_it_has_a_known_name() -> None:
    model = parse(
        "(float[N,3] x) => (float[N,4] y) { h = MatMul(x, a) z = Mul(h, g) y = other.Relu(z) }",
        {"a": (3, 4), "g": GATE},
    )
    result = EliminateDeadChannels()(model)
    assert not result.modified
    assert blocked_by(result) == [("z", 1, 2, "Relu", "there is no rule for Relu")]


def test_outputs_and_inputs_of_the_model_are_never_cut() -> None:
    text = """(float[N,3] x, float[N,4] h) => (float[N,2] y, float[N,4] z) {
        z = Mul(h, g) w = Relu(h) k = Mul(w, g) y = MatMul(k, b)
    }"""
    result = eliminate(text, WEIGHTS)
    assert result.kept["g"] == (ALL,) and result.kept["b"] == (ALL, ALL)
    assert {(b.value, b.reason) for b in result.blocked} == {("z", INPUT), ("k", INPUT)}


def test_axes_without_a_name_are_told_apart() -> None:
    text = GATED.replace("float[N,", "float[?,").replace("NODE", "w = Add(z, h)")
    model = parse(text, WEIGHTS)
    assert not EliminateDeadChannels()(model).modified  # z + h is not zero
    model = parse(text.replace("w = Add(z, h)", "w = Relu(z)"), WEIGHTS)
    assert EliminateDeadChannels()(model).kept["b"][0].tolist() == [0, 2]


def test_a_graph_in_which_everything_is_dead() -> None:
    """One channel stays on every axis: there are no empty tensors."""
    text = "(float[N,3] x) => (float[N,2] y) { h = MatMul(x, a) z = Mul(h, g) r = Relu(z) y = MatMul(r, b) }"
    kept = {"a": (ALL, [0]), "g": ([0],), "b": ([0], ALL)}
    result = assert_becomes(text, text, WEIGHTS | {"g": np.zeros(4)}, kept)
    assert result.blocked == ()


def test_a_dead_residual_branch_at_the_output_goes_and_the_name_stays() -> None:
    before = """(float[N,3] x) => (float[N,2] y) {
        r = MatMul(x, e) h = MatMul(x, a) z = Mul(h, g) t = MatMul(z, b) y = Add(r, t)
    }"""
    expected = "(float[N,3] x) => (float[N,2] y) { y = MatMul(x, e) }"
    assert_becomes(before, expected, WEIGHTS | {"g": np.zeros(4), "e": (3, 2)}, {"e": (ALL, ALL)})


def test_an_input_and_a_dead_term_are_not_merged_into_an_output() -> None:
    """x + 0 is the output: an input cannot be an output under another name."""
    text = "(float[N,2] x) => (float[N,2] y) { h = MatMul(x, a) z = Mul(h, g) t = MatMul(z, b) y = Add(x, t) }"
    result = eliminate(text, WEIGHTS | {"a": (2, 4), "g": np.zeros(4)})
    assert [v.name for v in result.model.graph.outputs] == ["y"]


def test_a_default_that_a_caller_may_replace_is_no_constant() -> None:
    text = "(float[N,3] x, float[4] g) => (float[N,2] y) { h = MatMul(x, a) z = Mul(h, g) y = MatMul(z, b) }"
    result = EliminateDeadChannels()(parse(text, WEIGHTS))
    assert not result.modified
    assert result.kept["b"] == (ALL, ALL)


@pytest.mark.parametrize("opset", [9, 12])
def test_an_opset_before_the_rules_is_left_alone_and_says_so(opset: int) -> None:
    text = GATED.replace("NODE", "w = Softmax<axis=1>(z)")
    model = parse(text, WEIGHTS, opset=opset)
    before = canonical(model)
    says = f"eliminate_dead_channels needs opset 13 or later, and the model is in opset {opset}; convert it first"
    with pytest.raises(OpsetError, match=says):
        EliminateDeadChannels()(model)
    assert canonical(model) == before
    result = apply_pass(EliminateDeadChannels(), model, Path("in.onnx"), "eliminate_dead_channels")
    assert isinstance(result, Skipped)
    assert not result.modified and canonical(result.model) == before
    assert says in result.reason


@pytest.mark.parametrize("opset", [13, 14, 18, 21, 23])
def test_every_opset_from_13_on(opset: int) -> None:
    text = GATED.replace("NODE", "w = Relu(z)")
    result = eliminate(text, WEIGHTS, opset=opset)
    assert result.kept["b"][0].tolist() == [0, 2]


def test_a_branch_found_dead_after_a_cut_goes_too() -> None:
    """The ones that are left of a gate are a copy; what it joins is cut in the next round."""
    text = """(float[N,3] x) => (float[N,2] y) {
        h = MatMul(x, a) z = Mul(h, g) p = MatMul(z, c) q = Mul(p, f) w = Add(q, h) v = Mul(w, g) y = MatMul(v, b)
    }"""
    weights = {"a": (3, 4), "g": np.array([1.0, 0, 1, 0]), "c": (4, 4), "f": np.array([0.0, 1, 0, 1]), "b": (4, 2)}
    result = eliminate(text, weights)
    assert [node.op_type for node in result.model.graph] == ["MatMul", "MatMul"]
    assert {n: tensor(result.model, n).shape for n in ("a", "b")} == {"a": (3, 2), "b": (2, 2)}
    assert "c" not in result.model.graph.initializers


def test_a_pass_says_what_it_is() -> None:
    shown = repr(EliminateDeadChannels(CleanUp(frozenset({"head.weight"}))))
    assert shown == "EliminateDeadChannels(clean_up=CleanUp(protected=frozenset({'head.weight'})), cut_caches=False)"


def test_a_copy_that_is_an_output_gives_its_name_away() -> None:
    text = "(float[N,3] x) => (float[N,3] y, float[N,3] same) { h = Relu(x) y = Identity(h) same = Identity(h) }"
    model = parse(text)
    assert CleanUp()(model).modified
    assert [v.name for v in model.graph.outputs] == ["y", "same"]
    assert [node.op_type for node in model.graph] == ["Relu", "Identity"]
    assert_same_values(parse(text), model)
    assert not CleanUp()(model).modified
    assert isinstance(model, ir.Model)


JOINED = """(float[N,3] x) => (float[N,2] y, float[N,4] z) {
    h = MatMul(x, a) d = Mul(h, g) z = Cos(d) k = MatMul(x, a2) c = Concat <axis = 1> (d, k) y = MatMul(c, b) }"""


def test_a_dead_part_goes_from_a_concat_also_where_something_else_needs_it() -> None:
    expected = """(float[N,3] x) => (float[N,2] y, float[N,4] z) {
        h = MatMul(x, a) d = Mul(h, g) z = Cos(d) k = MatMul(x, a2) y = MatMul(k, b) }"""
    weights = {"a": (3, 4), "g": np.zeros(4), "a2": (3, 5), "b": (9, 2)}
    kept = {"a": (ALL, ALL), "g": (ALL,), "a2": (ALL, ALL), "b": ([4, 5, 6, 7, 8], ALL)}
    result = assert_becomes(JOINED, expected, weights, kept)
    assert blocked_by(result) == []


def test_a_part_of_one_dead_channel_goes_from_a_concat() -> None:
    weights = {"a": (3, 1), "g": np.zeros(1), "a2": (3, 5), "b": (6, 2)}
    result = eliminate(JOINED.replace("float[N,4] z", "float[N,1] z"), weights)
    assert result.kept["b"][0].tolist() == [1, 2, 3, 4, 5]


def test_a_part_that_an_output_shows_stays() -> None:
    text = "(float[N,3] x) => (float[N,5] y) { h = MatMul(x, a) d = Mul(h, g) y = Concat <axis = 1> (d, x) }"
    weights = {"a": (3, 2), "g": np.zeros(2)}
    (only,) = whole(text, weights, ["a", "g"])
    assert (only.value, only.operator, only.reason) == ("y", "Concat", INPUT)


@pytest.mark.parametrize("scale", ["", "k = Mul(h, s)"])
def test_a_dead_layer_leaves_its_bias(scale: str) -> None:
    """r + (0 + b) is r + b: no channel of the layer has to stay for the sake of its shape."""
    before = f"""(float[N,3] x) => (float[N,3] y) {{
        m = MatMul(x, a) z = Mul(m, g) d = MatMul(z, b) h = Add(d, t) {scale} r = Add(x, {"k" if scale else "h"})
        y = Relu(r) }}"""
    expected = f"""(float[N,3] x) => (float[N,3] y) {{
        {scale.replace("h", "t")} r = Add(x, {"k" if scale else "t"}) y = Relu(r) }}"""
    weights = {"a": (3, 4), "g": np.zeros(4), "b": (4, 3), "t": (3,)} | ({"s": (3,)} if scale else {})
    result = assert_becomes(before, expected, weights, {"t": (ALL,)} | ({"s": (ALL,)} if scale else {}))
    assert result.blocked == ()

"""Symbolic shapes, and the shape inputs that are written from them."""

from __future__ import annotations

import numpy as np
import pytest

from cpcompile.passes.axes import ONE, Axis, broadcast
from cpcompile.passes.canonicalize_shapes import CanonicalizeShapes
from cpcompile.passes.channels import from_grid, to_grid
from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.shape_rules import infer_symbolic_shapes
from tests.unit.passes.graph_text import parse

BATCH, SEQUENCE = Axis(("B",), 1), Axis(("S",), 1)


def _shape(graphs, text, name, **constants):
    model = graphs.build(text, **constants)
    table = infer_symbolic_shapes(model.graph)
    return table.shape(next(out for node in model.graph for out in node.outputs if out.name == name))


def test_a_merged_axis_remembers_its_known_factor(graphs):
    shape = _shape(
        graphs,
        "(float[B,8,S,6] x) => (float[M,S,6] y) { y = Reshape(x, to) }",
        "y",
        to=np.array([-1, 6, 6]),
    )
    # B * 8 * S * 6 / 36 is no whole number of known factors: nothing is claimed
    assert shape is None or shape[0] != Axis(("B", "S"), 8)
    text = """(float[B,8,S,6] x) => (float[M,S,6] y) {
        s = Shape <start = 2, end = 3> (x) to = Concat <axis = 0> (rest, s, six) y = Reshape(x, to) }"""
    assert _shape(graphs, text, "y", rest=np.array([-1]), six=np.array([6])) == (Axis(("B",), 8), SEQUENCE, Axis((), 6))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("s = Shape(x) y = Expand(one, s)", (BATCH, Axis((), 8), SEQUENCE)),
        ("s = Shape <start = -1> (x) y = Expand(one, s)", (SEQUENCE,)),
        ("s = Shape(x) p = Gather(s, order) y = Expand(one, p)", (SEQUENCE, BATCH)),
        ("s = Shape(x) p = Slice(s, i, j) y = Expand(one, p)", (Axis((), 8), SEQUENCE)),
        ("s = Shape <start = 0, end = 1> (x) p = Mul(s, three) y = Expand(one, p)", (Axis(("B",), 3),)),
        ("s = Shape <start = 1, end = 2> (x) p = Div(s, two) y = Expand(one, p)", (Axis((), 4),)),
        ("y = MatMul(x, w)", (BATCH, Axis((), 8), Axis((), 5))),
    ],
)
def test_lengths_are_followed(graphs, body, expected):
    constants = {
        "one": np.array([1.0]),
        "order": np.array([2, 0]),
        "i": np.array([1]),
        "j": np.array([2**62]),
        "two": np.array([2]),
        "three": np.array([3]),
        "w": np.ones((7, 5)),
    }
    used = {
        name: array
        for name, array in constants.items()
        if f"{name})" in body or f"({name}," in body or f", {name}," in body
    }
    assert _shape(graphs, f"(float[B,8,S] x) => (float[A,C,D] y) {{ {body} }}", "y", **used) == expected


def test_broadcasting_claims_nothing_that_it_does_not_know():
    assert broadcast([(BATCH, ONE), (Axis((), 4),)]) == (BATCH, Axis((), 4))
    assert broadcast([(BATCH,), (SEQUENCE,)]) is None
    assert broadcast([(Axis((), 4),), None]) is None


def test_grids_hold_what_axes_mark():
    rows, columns = np.array([True, False, False]), np.array([False, True])
    grid = to_grid([rows, columns], (3, 2))
    assert grid.tolist() == [True, True, False, True, False, True]
    assert [mask.tolist() for mask in from_grid(grid, (3, 2))] == [rows.tolist(), columns.tolist()]


def test_target_shapes_become_explicit(graphs):
    text = """(float[B,S,12] x) => (float[B,S,3,4] y) {
        b = Shape <start = 0, end = 1> (x) s = Shape <start = 1, end = 2> (x)
        to = Concat <axis = 0> (b, s, three, four) y = Reshape(x, to) }"""
    before = graphs.build(text, three=np.array([3]), four=np.array([4]))
    after = before.clone()
    assert CanonicalizeShapes()(after).modified
    CleanUp()(after)
    assert graphs.operators(after) == ["Reshape"]
    assert next(iter(after.graph.initializers.values())).const_value.numpy().tolist() == [0, 0, 3, 4]
    graphs.assert_same(before, after, {"x": np.arange(72, dtype=np.float32).reshape(2, 3, 12)}, 0)
    assert not CanonicalizeShapes()(after).modified


def test_a_measured_length_keeps_its_rank(graphs):
    """[[4]] is a matrix, whatever is known of its one number."""
    text = """(float[B,4] x) => (int64[1,1] y) {
        s = Shape <start = 1, end = 2> (x) m = Unsqueeze(s, first) y = Neg(m) }"""
    before = graphs.build(text, first=np.array([0]))
    after = before.clone()
    assert CanonicalizeShapes()(after).modified
    CleanUp()(after)
    assert graphs.operators(after) == ["Neg"]
    graphs.assert_same(before, after, {"x": np.zeros((2, 4), np.float32)}, 0)


def test_a_default_says_nothing_of_the_shape_that_a_caller_gives():
    model = parse("(float[2,K] x, float[K] w) => (float[2,K] y) { y = Add(x, w) }", {"w": (3,)}, infer=False)
    assert infer_symbolic_shapes(model.graph).shape(model.graph.inputs[1]) == (Axis(("K",), 1),)

"""The rotation of queries and keys in one node: where it is that rotation, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.passes.rotary_embedding import RotaryEmbedding
from tests.unit.passes.graph_text import assert_same_values, check, parse

ROTATION = """(float[N,2,S,8] x, float[N,S,4] f) => (float[N,2,S,8] y)
    <float[N,2,S,4] l, float[N,2,S,4] r, float[N,2,S,4] n, float[N,2,S,8] t, float[N,2,S,8] a, float[N,2,S,8] b,
     float[N,S,8] d, float[N,S,8] c1, float[N,S,8] s1, float[N,1,S,8] c, float[N,1,S,8] s> {
    d = Concat<axis = -1>(f, f) c1 = Cos(d) s1 = Sin(d) c = Unsqueeze(c1, one) s = Unsqueeze(s1, one)
    l = Slice(x, zero, half, last) r = Slice(x, half, end, last) n = Neg(r)
    t = Concat<axis = -1>(n, l) a = Mul(x, c) b = Mul(t, s) y = Add(a, b) }"""
CONSTANTS = {"zero": 0, "one": 1, "half": 4, "last": -1, "end": 1 << 40, "two": 2}
SLICES = "l = Slice(x, zero, half, last) r = Slice(x, half, end, last)"


def rotation(*changes: tuple[str, str], opset: int = 23) -> ir.Model:
    text = ROTATION
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    constants = {name: np.array([number]) for name, number in CONSTANTS.items()}
    return parse(text, {**constants, "scale": np.array(1.25), "parts": np.array([2, 4, 2])}, opset=opset)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ((SLICES, "l, r = Split<axis = 3, num_outputs = 2>(x)"),),
        (("a = Mul(x, c) b = Mul(t, s) y = Add(a, b)", "a = Mul(c, x) b = Mul(s, t) y = Add(b, a)"),),
        (("c1 = Cos(d)", "c0 = Cos(d) c1 = Mul(scale, c0)"),),
        (("r = Slice(x, half, end, last)", "r = Slice(x, half, end, last, one)"),),
    ],
)
def test_a_rotation_becomes_one_node(changes: tuple[tuple[str, str], ...]) -> None:
    original, model = rotation(*changes), rotation(*changes)
    assert RotaryEmbedding()(model).modified
    operators = [node.op_type for node in model.graph]
    assert operators[-1] == "RotaryEmbedding" and not {"Neg", "Add", "Split"} & set(operators)
    check(model)
    assert_same_values(original, model)
    assert not RotaryEmbedding()(model).modified


@pytest.mark.parametrize(
    "changes",
    [
        (("Neg(r)", "Abs(r)"),),
        (("t = Concat<axis = -1>(n, l)", "t = Concat<axis = -1>(l, n)"),),
        (("n = Neg(r)", "n = Neg(l)"), ("(n, l)", "(n, r)")),
        (("r = Slice(x, half, end, last)", "r = Slice(x, half, end, last, two)"),),
        (("d = Concat<axis = -1>(f, f)", "g = Neg(f) d = Concat<axis = -1>(f, g)"),),  # halves of sin that differ
        (("y = Add(a, b)", "y = Sub(a, b)"),),
        (("r = Slice(x, half, end, last)", "r0, r, r2 = Split<axis = 3>(x, parts)"),),  # from the third channel on
        (("float", "double"),),
        (("a = Mul(x, c)", "x2 = Neg(x) a = Mul(x2, c)"),),
    ],
)
def test_something_else_stays(changes: tuple[tuple[str, str], ...]) -> None:
    assert not RotaryEmbedding()(rotation(*changes)).modified


def test_older_opsets_and_unknown_shapes_stay() -> None:
    assert not RotaryEmbedding()(rotation(opset=22)).modified
    model = rotation()
    for node in model.graph:
        for out in node.outputs:
            out.shape = None
    assert not RotaryEmbedding()(model).modified


def test_names_may_be_taken() -> None:
    model = rotation()
    model.graph.register_initializer(ir.Value(name="c.start", const_value=ir.tensor([5], name="c.start")))
    assert RotaryEmbedding()(model).modified
    assert_same_values(rotation(), model)


def test_one_table_serves_all_layers() -> None:
    model = rotation(("y = Add(a, b)", "u = Add(a, b) a2 = Mul(x, c) b2 = Mul(t, s) w = Add(a2, b2) y = Add(u, w)"))
    assert RotaryEmbedding()(model).modified
    assert [node.op_type for node in model.graph].count("Slice") == 2

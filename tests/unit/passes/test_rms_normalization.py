"""The normalisation by the root mean square in one node: where it is that, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.passes.rms_normalization import RmsNormalization
from tests.unit.passes.graph_text import assert_same_values, check, parse

NORM = """(float[N,S,8] x) => (float[N,S,8] y) {
    p = Pow(x, two) m = ReduceMean<keepdims = 1>(p, last) a = Add(m, epsilon) q = Sqrt(a) r = Reciprocal(q)
    n = Mul(x, r) y = Mul(w, n) }"""


def norm(*changes: tuple[str, str], opset: int = 23) -> ir.Model:
    text = NORM
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    numbers = {"two": np.array(2.0), "three": np.array(3.0), "epsilon": np.array(1e-2), "last": np.array([-1])}
    others = {"axis": np.array([1]), "v": (5, 8), "one": (1,)}
    return parse(text, {**numbers, **others, "w": (8,)}, opset=opset)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (("n = Mul(x, r) y = Mul(w, n)", "n = Mul(r, x) y = Mul(n, w)"),),
        (("Add(m, epsilon)", "Add(epsilon, m)"),),
        (("y = Mul(w, n)", "w1 = Add(w, one) y = Mul(n, w1)"),),  # as Gemma has it
        (("y = Mul(w, n)", "z = Mul(w, n) y = Neg(z)"),),
        (("y = Mul(w, n)", "z = Mul(w, n) y = Mul(z, z)"),),
    ],
)
def test_it_becomes_one_node(changes: tuple[tuple[str, str], ...]) -> None:
    original, model = norm(*changes), norm(*changes)
    assert RmsNormalization()(model).modified
    operators = [node.op_type for node in model.graph]
    assert operators.count("RMSNormalization") == 1
    assert not {"Pow", "ReduceMean", "Sqrt", "Reciprocal"} & set(operators)
    check(model)
    assert_same_values(original, model)
    assert not RmsNormalization()(model).modified


@pytest.mark.parametrize(
    "changes",
    [
        (("Pow(x, two)", "Pow(x, three)"),),
        (("p = Pow(x, two)", "b = Neg(x) p = Pow(b, two)"),),  # the same number, but not what is looked for
        (("ReduceMean<keepdims = 1>(p, last)", "ReduceMean<keepdims = 1>(p, axis)"),),
        (("ReduceMean", "ReduceSum"),),
        (("Mul(w, n)", "Mul(v, n)"),),  # a weight per position
        (("Mul(w, n)", "Mul(one, n)"),),
        (("Add(m, epsilon)", "Add(m, m)"),),
        (("r = Reciprocal(q)", "r = Neg(q)"),),
        (("float", "double"),),
    ],
)
def test_something_else_stays(changes: tuple[tuple[str, str], ...]) -> None:
    assert not RmsNormalization()(norm(*changes)).modified


def test_what_others_read_stays_beside_it() -> None:
    change = (("=> (float[N,S,8] y)", "=> (float[N,S,8] y, float[N,S,1] r)"),)
    original, model = norm(*change), norm(*change)
    assert RmsNormalization()(model).modified
    assert {"RMSNormalization", "Reciprocal"} <= {node.op_type for node in model.graph}
    assert_same_values(original, model)


def test_older_opsets_stay() -> None:
    assert not RmsNormalization()(norm(opset=22)).modified

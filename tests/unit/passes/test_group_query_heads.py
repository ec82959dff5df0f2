"""Query heads share key and value heads: the copies go where they are copies, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.group_query_heads import GroupQueryHeads
from tests.unit.passes.graph_text import assert_same_values, check, parse

REPEATED = """(float[N,4,S,8] q, float[N,2,S,8] k, float[N,2,S,8] v) => (float[N,4,S,8] y)
    <float[N,2,S,8] ks, float[N,2,2,S,8] k2, float[N,2,2,S,8] v2, float[N,4,S,8] k3, float[N,4,S,8] v3> {
    ks = Slice(k, zero, end, two, one) k1 = Unsqueeze(ks, two) k2 = Expand(k1, times) k3 = Reshape(k2, merged)
    v1 = Unsqueeze(v, two) v2 = Expand(v1, times) v3 = Reshape(v2, merged)
    y = Attention(q, k3, v3) }"""
SLICE, ATTENTION = "Slice(k, zero, end, two, one)", "y = Attention(q, k3, v3)"
LIMIT = np.iinfo(np.int64).max
CONSTANTS = {"zero": 0, "one": 1, "two": 2, "last": -1, "end": LIMIT, "begin": -LIMIT}


def repeated(part: str = "", other: str = "") -> ir.Model:
    """The graph of repeated heads, with `other` in place of `part`."""
    assert part in REPEATED
    arrays = {name: np.array([number]) for name, number in CONSTANTS.items()}
    shapes = {"times": [1, 1, 2, 1, 1], "twice": [1, 2, 1, 1, 1], "merged": [0, 4, -1, 8]}
    arrays |= {name: np.array(shape) for name, shape in shapes.items()}
    text = REPEATED.replace(part, other) if part else REPEATED
    return parse(text, {name: array for name, array in arrays.items() if f" {name}" in text})


@pytest.mark.parametrize("whole", [SLICE, "Slice(k, zero, end, two)", "Identity(k)"])
def test_heads_that_were_repeated_are_read_once(whole: str) -> None:
    original, model = repeated(SLICE, whole), repeated(SLICE, whole)
    assert GroupQueryHeads()(model).modified
    CleanUp()(model)
    assert [node.op_type for node in model.graph] == ["Attention"]
    check(model)
    assert_same_values(original, model)
    assert not GroupQueryHeads()(model).modified


def test_tokens_in_another_order_stay_in_it() -> None:
    backwards = (SLICE, "Slice(k, last, begin, two, last)")
    model = repeated(*backwards)
    assert GroupQueryHeads()(model).modified
    CleanUp()(model)
    assert [node.op_type for node in model.graph] == ["Slice", "Attention"]
    assert_same_values(repeated(*backwards), model)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("k1 = Unsqueeze(ks, two) k2 = Expand(k1, times)", "k1 = Unsqueeze(ks, one) k2 = Expand(k1, twice)"),
        ("k2 = Expand(k1, times)", "k0 = Unsqueeze(ks, one) k2 = Concat<axis = 1>(k0, k0)"),  # heads 0, 1, 0, 1
        (ATTENTION, f"k4 = Neg(k3) {ATTENTION.replace('k3', 'k4')}"),  # something happens to the copies
        (ATTENTION, ATTENTION.replace("v3)", "v3, , k, v)")),  # a cache of its own
    ],
)
def test_other_copies_stay(part: str, other: str) -> None:
    assert not GroupQueryHeads()(repeated(part, other)).modified


def test_without_shapes_nothing_changes() -> None:
    model = repeated()
    for node in model.graph:
        for out in node.outputs:
            out.shape = None
    assert not GroupQueryHeads()(model).modified

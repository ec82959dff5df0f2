"""Operators that move channels: Reshape, Transpose, Concat, Split, Slice, Gather, Expand. Before / expected."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.passes.graph_text import assert_becomes, blocked_by, canonical, eliminate, whole

ALL = None


def gate(*dead: int, of: int) -> np.ndarray:
    """Channel i has the gate i + 1 / 2, or 0."""
    return np.array([0.0 if i in dead else i + 0.5 for i in range(of)])


def test_reshape_splits_and_merges_groups() -> None:
    """A gate per head, applied to heads on an axis of their own, cuts two columns each of the matrix before."""
    text = """(float[N,S,3] x) => (float[N,S,2] y) <int64[4] split = {0, 0, %s, 2}, int64[3] merge = {0, 0, %s}> {
        h = MatMul(x, a) r = Reshape(h, split) z = Mul(r, g) m = Reshape(z, merge) y = MatMul(m, b)
    }"""
    weights = {"a": (3, 8), "g": gate(1, 2, of=4).reshape(4, 1), "b": (8, 2)}
    columns = [0, 1, 6, 7]
    kept = {"a": (ALL, columns), "g": ([0, 3], ALL), "b": (columns, ALL)}
    assert_becomes(text % (4, -1), text % (2, 4), weights, kept)


def test_half_a_group_stays_and_says_so() -> None:
    text = """(float[N,3] x) => (float[N,2] y) <int64[3] split = {0, 4, 2}, int64[2] merge = {0, 8}> {
        h = MatMul(x, a) r = Reshape(h, split) s = Softmax(r) m = Reshape(s, merge) z = Mul(m, g) y = MatMul(z, b)
    }"""
    result = eliminate(text, {"a": (3, 8), "g": gate(2, 3, 5, of=8), "b": (8, 2)})
    assert [axis.tolist() for axis in result.kept["b"] if axis is not None] == [[0, 1, 4, 5, 6, 7]]
    assert blocked_by(result) == [("z", 1, 1, "Reshape", "it regroups channels of which some have to stay")]


def test_transpose_and_a_dynamic_batch_merged_with_heads() -> None:
    text = """(float[N,5,3] x) => (float[N,5,2] y)
        <int64[4] split = {0,0,%s,2}, int64[3] flat = {-1,5,2},
         int64[4] back = {-1,%s,5,2}, int64[3] merge = {0,0,%s}> {
        h = MatMul(x, a) r = Reshape(h, split) t = Transpose<perm=[0,2,1,3]>(r) f = Reshape(t, flat) e = Tanh(f)
        u = Reshape(e, back) v = Transpose<perm=[0,2,1,3]>(u) m = Reshape(v, merge) z = Mul(m, g) y = MatMul(z, b)
    }"""
    weights = {"a": (3, 8), "g": gate(0, 1, 4, 5, of=8), "b": (8, 2)}
    columns = [2, 3, 6, 7]
    kept = {"a": (ALL, columns), "g": (columns,), "b": (columns, ALL)}
    expected = (text % (2, 2, 4)).replace("{0,0,2,2}", "{0,5,2,2}").replace("{0,0,4}", "{0,5,4}")
    assert_becomes(text % (4, 4, 8), expected, weights, kept)


def test_concat_and_its_parts() -> None:
    text = """(float[N,3] x) => (float[N,2] y) {
        p = MatMul(x, a) q = MatMul(x, e) c = Concat<axis=1>(p, q, p) z = Mul(c, g) y = MatMul(z, b)
    }"""
    weights = {"a": (3, 3), "e": (3, 2), "g": gate(1, 2, 3, 6, of=8), "b": (8, 2)}
    left = [0, 2, 4, 5, 7]  # channel 1 of p is dead at both places, channel 2 only at the first
    kept = {"a": (ALL, [0, 2]), "e": (ALL, [1]), "g": (left,), "b": (left, ALL)}
    result = assert_becomes(text, text, weights, kept)
    assert blocked_by(result) == [("z", 1, 1, "MatMul", "its channels are not zero")]


def test_a_part_with_nothing_left_goes_with_what_makes_it() -> None:
    text = """(float[N,3] x) => (float[N,2] y) {
        p = MatMul(x, a) q = MatMul(x, e) r = Tanh(p) c = Concat<axis=1>(p, q, r) z = Mul(c, g) y = MatMul(z, b)
    }"""
    weights = {"a": (3, 3), "e": (3, 2), "g": gate(3, 4, of=8), "b": (8, 2)}
    left = [0, 1, 2, 5, 6, 7]
    kept = {"a": (ALL, ALL), "g": (left,), "b": (left, ALL)}
    expected = text.replace("q = MatMul(x, e) ", "").replace("p, q, r", "p, r")
    assert assert_becomes(text, expected, weights, kept).blocked == ()


def test_the_only_part_with_something_left_takes_the_place_of_the_whole() -> None:
    before = """(float[N,3] x) => (float[N,2] y) {
        p = MatMul(x, a) q = MatMul(x, e) c = Concat<axis=1>(p, q, p) z = Mul(c, g) y = MatMul(z, b)
    }"""
    expected = "(float[N,3] x) => (float[N,2] y) { q = MatMul(x, e) z = Mul(q, g) y = MatMul(z, b) }"
    weights = {"a": (3, 3), "e": (3, 2), "g": gate(0, 1, 2, 3, 5, 6, 7, of=8), "b": (8, 2)}
    kept = {"e": (ALL, [1]), "g": ([4],), "b": ([4], ALL)}
    assert assert_becomes(before, expected, weights, kept).blocked == ()


def test_a_concat_with_nothing_left_keeps_one_channel() -> None:
    text = """(float[N,3] x) => (float[N,2] y) {
        p = MatMul(x, a) q = MatMul(x, e) c = Concat<axis=1>(p, q) z = Mul(c, g) y = MatMul(z, b)
    }"""
    expected = "(float[N,3] x) => (float[N,2] y) { p = MatMul(x, a) z = Mul(p, g) y = MatMul(z, b) }"
    weights = {"a": (3, 3), "e": (3, 2), "g": np.zeros(5), "b": (5, 2)}
    assert_becomes(text, expected, weights, {"a": (ALL, [0]), "g": ([0],), "b": ([0], ALL)})


@pytest.mark.parametrize("equal", [True, False])
def test_split(equal: bool) -> None:
    """Equal parts become parts of given sizes."""
    if equal:
        before = "(float[N,3] x) => (float[N,2] y) { h = MatMul(x, a) p, q = Split<axis=1, num_outputs=2>(h) "
    else:
        before = (
            "(float[N,3] x) => (float[N,2] y) <int64[2] s = {2, 4}> { h = MatMul(x, a) p, q = Split<axis=-1>(h, s) "
        )
    rest = "z = Mul(p, g) w = Mul(q, f) t = MatMul(z, b) u = MatMul(w, c) y = Add(t, u) }"
    first, second = (3, 3) if equal else (2, 4)
    weights = {
        "a": (3, 6),
        "g": gate(1, of=first),
        "f": gate(0, 2, of=second),
        "b": (first, 2),
        "c": (second, 2),
    }
    left, right = [i for i in range(first) if i != 1], [i for i in range(second) if i not in (0, 2)]
    sizes = f"<int64[2] s = {{{len(left)}, {len(right)}}}>"
    axis = 1 if equal else -1
    after = f"(float[N,3] x) => (float[N,2] y) {sizes} {{ h = MatMul(x, a) p, q = Split<axis={axis}>(h, s) "
    kept = {
        "a": (ALL, [*left, *(first + i for i in right)]),
        "g": (left,),
        "f": (right,),
        "b": (left, ALL),
        "c": (right, ALL),
    }
    assert_becomes(before + rest, after + rest, weights, kept)


def test_slice_moves_its_window_and_frees_what_lies_outside() -> None:
    text = """(float[N,3] x) => (float[N,2] y) <int64[1] from = {%s}, int64[1] to = {%s}, int64[1] axis = {1}> {
        h = MatMul(x, a) s = Slice(h, from, to, axis) z = Mul(s, g) y = MatMul(z, b)
    }"""
    weights = {"a": (3, 6), "g": gate(0, of=3), "b": (3, 2)}
    kept = {"a": (ALL, [3, 4]), "g": ([1, 2],), "b": ([1, 2], ALL)}
    assert_becomes(text % (2, -1), text % (0, 2), weights, kept)


STEPS = """(float[N,3] x) => (float[N,2] y)
    <int64[1] from = {%s}, int64[1] to = {%s}, int64[1] axis = {1}, int64[1] step = {%s}> {
    h = MatMul(x, a) s = Slice(h, from, to, axis, step) z = Mul(s, g) y = MatMul(z, b)
}"""


@pytest.mark.parametrize(
    ("bounds", "dead", "left", "order", "after"),
    [
        ((1, 6, 2), [0], [3, 5], [1, 2], (0, 2, 1)),  # 1, 3, 5: the first is dead, nobody asks for what lies between
        ((-1, -7, -1), [2], [0, 1, 2, 4, 5], [0, 1, 3, 4, 5], (4, -6, -1)),
        ((5, 0, -2), [1], [1, 5], [0, 2], (1, -3, -1)),
    ],
)
def test_slice_with_steps(
    bounds: tuple[int, ...], dead: list[int], left: list[int], order: list[int], after: tuple[int, ...]
) -> None:
    size = len(range(6)[slice(*bounds)])
    weights = {"a": (3, 6), "g": gate(*dead, of=size), "b": (size, 2)}
    kept = {"a": (ALL, left), "g": (order,), "b": (order, ALL)}
    if bounds == (-1, -7, -1):
        kept["a"] = (ALL, [0, 1, 2, 4, 5])
        weights["g"] = gate(2, of=6)
    assert_becomes(STEPS % bounds, STEPS % after, weights, kept)


def test_what_steps_cannot_say_is_picked() -> None:
    """Columns 0, 2, 4, 6 are taken, 2 is dead, and another reader keeps column 1: 0, 3, 4 of what is left."""
    text = """(float[N,3] x) => (float[N,2] y, float[N,2] w)
        <int64[2] from = {0, 0}, int64[2] to = {9, 99}, int64[2] axes = {1, 0}, int64[2] step = {2, 1},
         int64[2] odd = {1, 3}> {
        h = MatMul(x, a) o = Gather<axis=1>(h, odd) w = MatMul(o, c)
        s = Slice(h, from, to, axes, step) z = Mul(s, g) y = MatMul(z, b)
    }"""
    result = eliminate(text, {"a": (3, 8), "c": (2, 2), "g": gate(1, of=4), "b": (4, 2)})
    assert [a.tolist() for a in result.kept["a"] if a is not None] == [[0, 1, 3, 4, 6]]
    nodes = {node.outputs[0].name: canonical(result.model)[1:][at] for at, node in enumerate(result.model.graph)}
    assert nodes["s.channels"] == ("Gather", ["h", [0, 3, 4]], ["s.channels"], [("axis", "1")])
    assert nodes["s"] == ("Slice", ["s.channels", [0, 0], [3, 99], [1, 0], [1, 1]], ["s"], [])
    assert nodes["o"] == ("Gather", ["h", [1, 2]], ["o"], [("axis", "1")])


def test_slice_with_bounds_that_are_no_constants_says_so() -> None:
    text = """(float[N,4] x, int64[1] from) => (float[N,T] y) <int64[1] to = {4}, int64[1] axis = {1}> {
        h = MatMul(x, a) z = Mul(h, g) y = Slice(z, from, to, axis)
    }"""
    (only,) = whole(text, {"a": (4, 4), "g": gate(1, of=4)}, ["a"])
    assert (only.operator, only.reason) == ("Slice", "its bounds are not constant")


@pytest.mark.parametrize(("number", "zero"), [(None, True), (0.0, True), (1.5, False)])
def test_pad_beside_and_along_the_channels(number: float | None, zero: bool) -> None:
    """Channel 1 of 3 is dead; so are the channels of the padding, if it is zero, or if nobody needs them."""
    text = """(float[N,S,3] x) => (float[N,T,2] y) <int64[4] pads = {1, %s, 0, %s}, int64[2] axes = {1, -1}> {
        h = MatMul(x, a) k = Mul(h, f) p = Pad(k, pads, NUMBER, axes) z = Mul(p, g) y = MatMul(z, b)
    }""".replace("NUMBER", "" if number is None else "number")
    weights = {"a": (3, 3), "f": gate(1, of=3), "g": gate(0, 6, of=7), "b": (7, 2)}
    if number is not None:
        weights["number"] = np.array(number)
    if zero:
        result = eliminate(text % (2, 2), weights)
        assert [a.tolist() for a in result.kept["b"] if a is not None] == [[2, 4]]
        assert [a.tolist() for a in result.kept["a"] if a is not None] == [[0, 2]]
    else:
        kept = {"a": (ALL, ALL), "f": (ALL,), "g": ([1, 2, 3, 4, 5],), "b": ([1, 2, 3, 4, 5], ALL), "number": ()}
        result = assert_becomes(text % (2, 2), text % (1, 1), weights, kept)
        assert blocked_by(result) == [("k", 2, 1, "MatMul", "its channels are not zero")]


def test_pad_with_what_is_there_keeps_its_axis_and_lets_the_others_go() -> None:
    text = """(float[N,5,3] x) => (float[N,7,2] y) <int64[6] pads = {0, 1, 0, 0, 1, 0}> {
        h = MatMul(x, a) k = Mul(h, f) p = Pad<mode="reflect">(k, pads) y = MatMul(p, b)
    }"""
    weights = {"a": (3, 3), "f": gate(1, of=3), "b": (3, 2)}
    assert_becomes(text, text, weights, {"a": (ALL, [0, 2]), "f": ([0, 2],), "b": ([0, 2], ALL)})
    (only,) = whole(text.replace("{0, 1, 0, 0, 1, 0}", "{0, 1, 1, 0, 1, 0}"), weights | {"b": (4, 2)}, ["a"])
    assert (only.value, only.operator) == ("k", "Pad")
    assert only.reason == "it crops this axis, or pads it with more than a constant"


def test_slice_of_a_dynamic_axis_keeps_it_and_lets_the_others_go() -> None:
    text = """(float[N,S,3] x) => (float[N,T,2] y) <int64[1] from = {1}, int64[1] to = {3}, int64[1] axis = {1}> {
        h = MatMul(x, a) s = Slice(h, from, to, axis) z = Mul(s, g) y = MatMul(z, b)
    }"""
    assert_becomes(
        text,
        text,
        {"a": (3, 3), "g": gate(0, of=3), "b": (3, 2)},
        {"a": (ALL, [1, 2]), "g": ([1, 2],), "b": ([1, 2], ALL)},
    )


def test_gather_with_constant_indices() -> None:
    """Rows that nobody picks go; a picked row whose result is dead is not picked any more."""
    text = """(float[N,3] x) => (float[N,2] y) <int64[%s] index = {%s}> {
        h = MatMul(x, a) s = Gather<axis=1>(h, index) z = Mul(s, g) y = MatMul(z, b)
    }"""
    weights = {"a": (3, 6), "g": gate(1, of=4), "b": (4, 2)}
    kept = {"a": (ALL, [0, 4, 5]), "g": ([0, 2, 3],), "b": ([0, 2, 3], ALL)}
    assert_becomes(text % (4, "-1, 2, 4, 0"), text % (3, "2, 1, 0"), weights, kept)


def test_gather_of_one_row() -> None:
    text = """(float[N,3] x) => (float[N,2] y) <int64 index = {2}, int64[3] split = {-1, 3, 2}> {
        h = MatMul(x, a) r = Reshape(h, split) s = Gather<axis=1>(r, index) y = MatMul(s, b)
    }"""
    result = eliminate(text, {"a": (3, 6), "b": (2, 2)})
    assert [a.tolist() for a in result.kept["a"] if a is not None] == [[4, 5]]


def test_a_long_constant_index_is_read_whole() -> None:
    text = "(float[N,3] x) => (float[N,2] y) { h = MatMul(x, a) s = Gather<axis=1>(h, index) y = MatMul(s, b) }"
    weights = {"a": (3, 200), "index": np.arange(0, 200, 2), "b": (100, 2)}
    result = eliminate(text, weights)
    assert [a.tolist() for a in result.kept["a"] if a is not None] == [list(range(0, 200, 2))]


def test_gather_with_dynamic_indices_keeps_the_rows_but_not_the_columns() -> None:
    text = "(int64[N,S] ids) => (float[N,S,2] y) { e = Gather(table, ids) z = Mul(e, g) y = MatMul(z, b) }"
    weights = {"table": (5, 4), "g": gate(0, 3, of=4), "b": (4, 2)}
    assert_becomes(text, text, weights, {"table": (ALL, [1, 2]), "g": ([1, 2],), "b": ([1, 2], ALL)})
    rows = weights | {"table": np.arange(20.0).reshape(5, 4) * (np.arange(5) != 2)[:, None]}
    assert eliminate(text, rows).kept["table"][0] is ALL  # row 2 is zero, but it may be asked for


def test_expand_squeeze_and_unsqueeze() -> None:
    """A gate per group becomes one per channel, as exporters write it."""
    text = """(float[N,3] x) => (float[N,2] y)
        <int64[1] one = {1}, int64[3] wide = {%s, 3, 1}, int64[1] flat = {%s}, int64[1] two = {2}> {
        u = Unsqueeze(g, one) v = Unsqueeze(u, two) e = Expand(v, wide) s = Squeeze(e, two) c = Reshape(s, flat)
        h = MatMul(x, a) z = Mul(h, c) y = MatMul(z, b)
    }"""
    left = [0, 1, 2, 6, 7, 8]
    kept = {"a": (ALL, left), "g": ([0, 2],), "b": (left, ALL)}
    assert_becomes(text % (1, -1), text % (1, 6), {"a": (3, 12), "g": gate(1, 3, of=4), "b": (12, 2)}, kept)


def test_shape_keeps_what_it_measures() -> None:
    text = """(float[N,3] x) => (float[N,2] y, int64[1] n) {
        h = MatMul(x, a) z = Mul(h, g) n = Shape<start=START, end=END>(h) y = MatMul(z, b)
    }"""
    weights = {"a": (3, 4), "g": gate(1, of=4), "b": (4, 2)}
    cut = text.replace("START", "0").replace("END", "1")
    assert_becomes(cut, cut, weights, {"a": (ALL, [0, 2, 3]), "g": ([0, 2, 3],), "b": ([0, 2, 3], ALL)})
    (only,) = whole(text.replace("START", "1").replace("END", "2"), weights, ["a", "b"])
    assert (only.value, only.operator, only.reason) == ("z", "Shape", "its length is read")


def test_a_target_shape_that_cannot_be_said_blocks() -> None:
    """A table repeated as often as NonZero found something: no input could tell the number after a cut."""
    text = """(float[N,S] x) => (float[P,3,2] y) <int64[1] three = {3}, int64[1] four = {4}> {
        n = NonZero(x) found = Shape<start=1>(n) t = Concat<axis=0>(found, three, four)
        e = Expand(a, t) z = Mul(e, g) y = MatMul(z, b)
    }"""
    (only,) = whole(text, {"a": (1, 4), "g": gate(1, of=4), "b": (4, 2)}, ["a", "b"])
    assert (only.value, only.operator) == ("z", "Expand")
    assert only.reason == "the lengths of its dynamic axes cannot be read from any tensor"

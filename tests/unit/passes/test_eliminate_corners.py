"""Parts of an axis, vectors that several operators use, heads of masks, branches that end in an output."""

from __future__ import annotations

import numpy as np
import pytest

from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels

LEFT = [1, 2, 5, 6, 7]
GATE = np.where(np.isin(np.arange(8), LEFT), np.arange(1.0, 9.0), 0.0)
TOLERANCE = 1e-6


def _weights(**shapes):
    rng = np.random.default_rng(5)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


LINEAR = _weights(a=(4, 8), b=(8, 5))
FEEDS = {"x": np.random.default_rng(6).normal(size=(3, 4)).astype(np.float32)}
SEQUENCE = {"x": np.random.default_rng(6).normal(size=(2, 3, 4)).astype(np.float32)}
CUT = {"a": (4, 5), "g": (5,), "b": (5, 5)}


def _eliminate(graphs, text, feeds, opset=20, **initializers):
    """Eliminate, and check what holds for every graph: values, interface, standard, and that once is enough."""
    before = graphs.build(text, opset=opset, **initializers)
    after = before.clone()
    result = EliminateDeadChannels()(after)
    graphs.check(after)
    graphs.assert_same(before, after, feeds, TOLERANCE)
    sizes = [{n: tuple(v.shape or ()) for n, v in model.graph.initializers.items()} for model in (before, after)]
    assert result.modified == (sizes[0] != sizes[1] or graphs.operators(before) != graphs.operators(after))
    assert not EliminateDeadChannels()(after).modified
    return after, result


ATTENTION = """(float[B,S,4] x{inputs}) => (float[B,S,5] y{outputs}) {{
    q0 = MatMul(x, q) q1 = Reshape(q0, qs) q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
    k0 = MatMul(x, k) k1 = Reshape(k0, ks) k2 = Transpose <perm = [0, 2, 1, 3]> (k1)
    v0 = MatMul(x, v) v1 = Reshape(v0, ks) v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
    {attention}
    t = Transpose <perm = [0, 2, 1, 3]> (o) f = Reshape(t, merge) z = Mul(f, g) y = MatMul(z, b) }}"""


def _attend(graphs, heads, keys, dead, attention="o = Attention <is_causal = 1> (q2, k2, v2)", inputs="", **more):
    """Heads of 2 channels; the query heads `dead` are closed after attention."""
    gate = np.repeat(np.where(np.isin(np.arange(heads), dead), 0.0, 1.5), 2)
    feeds = {**SEQUENCE, **more.pop("feeds", {})}
    return _eliminate(
        graphs,
        ATTENTION.format(attention=attention, inputs=inputs, outputs=more.pop("outputs", "")),
        feeds,
        opset=23,
        g=gate,
        qs=np.array([0, 0, heads, 2]),
        ks=np.array([0, 0, keys, 2]),
        merge=np.array([0, 0, heads * 2]),
        **_weights(q=(4, heads * 2), k=(4, keys * 2), v=(4, keys * 2), b=(heads * 2, 5)),
        **more,
    )


def test_matrix_times_vector(graphs):
    text = "(float[N,4] x) => (float[N] y) { h = MatMul(x, a) z = Mul(h, g) y = MatMul(z, v) }"
    after, _ = _eliminate(graphs, text, FEEDS, g=GATE, **_weights(a=(4, 8), v=(8,)))
    assert graphs.shapes(after) == {"a": (4, 5), "g": (5,), "v": (5,)}


def test_concat_cuts_each_part_by_itself(graphs):
    gate = np.concatenate([GATE, np.where(np.arange(8) < 2, 0.0, 1.5)])
    text = """(float[N,4] x) => (float[N,5] y) {
        h = MatMul(x, a) k = MatMul(x, a2) c = Concat <axis = 1> (h, k) z = Mul(c, g) y = MatMul(z, b) }"""
    after, result = _eliminate(graphs, text, FEEDS, g=gate, **_weights(a=(4, 8), a2=(4, 8), b=(16, 5)))
    assert graphs.shapes(after) == {"a": (4, 5), "a2": (4, 6), "g": (11,), "b": (11, 5)}
    assert result.blocked == ()


def test_a_part_with_nothing_left_goes(graphs):
    gate = np.concatenate([np.zeros(8), np.ones(8) * 2])
    text = """(float[N,4] x) => (float[N,5] y) {
        h = MatMul(x, a) k = MatMul(x, a2) c = Concat <axis = 1> (h, k) z = Mul(c, g) y = MatMul(z, b) }"""
    after, result = _eliminate(graphs, text, FEEDS, g=gate, **_weights(a=(4, 8), a2=(4, 8), b=(16, 5)))
    assert graphs.shapes(after) == {"a2": (4, 8), "g": (8,), "b": (8, 5)}
    assert graphs.operators(after) == ["MatMul", "Mul", "MatMul"]
    assert result.blocked == ()


def test_attention_with_a_mask_per_head(graphs):
    slopes = np.random.default_rng(1).normal(size=(1, 4, 1, 1))
    text = "m = Mul(base, slopes) o = Attention (q2, k2, v2, m)"
    after, _ = _attend(
        graphs,
        4,
        4,
        [1, 2],
        text,
        inputs=", float[1,1,S,S] base",
        feeds={"base": np.ones((1, 1, 3, 3), np.float32)},
        slopes=slopes,
    )
    assert graphs.shapes(after)["q"] == (4, 4)
    assert graphs.shapes(after)["slopes"] == (1, 2, 1, 1)


def test_a_dead_branch_that_ends_in_an_output_disappears_too(graphs):
    text = "(float[N,4] x) => (float[N,4] y) { h = MatMul(x, a) z = Mul(h, g) d = MatMul(z, b) y = Add(x, d) }"
    after, _ = _eliminate(graphs, text, FEEDS, g=np.zeros(8), **_weights(a=(4, 8), b=(8, 4)))
    assert graphs.operators(after) == ["Identity"]


def test_a_vector_that_two_branches_share_is_cut_for_each(graphs):
    text = """(float[N,4] x) => (float[N,5] y, float[N,8] w) {
        h = MatMul(x, a) k = Mul(h, s) z = Mul(k, g) y = MatMul(z, b) m = MatMul(x, c) w = Mul(m, s) }"""
    after, result = _eliminate(graphs, text, FEEDS, g=GATE, s=np.arange(1.0, 9.0), **_weights(c=(4, 8)), **LINEAR)
    shapes = graphs.shapes(after)
    assert {name: shapes[name] for name in CUT} == CUT
    assert shapes["c"] == (4, 8)
    assert sorted(shape for name, shape in shapes.items() if name.startswith("s")) == [(5,), (8,)]
    assert result.kept.keys() == shapes.keys()


@pytest.mark.parametrize(
    "split", ["p, q = Split <axis = 1, num_outputs = 2> (h)", "p, q = Split <axis = 1> (h, halves)"]
)
def test_split_loses_the_first_channel_of_a_part_like_any_other(graphs, split):
    text = f"""(float[N,4] x) => (float[N,5] y) {{
        h = MatMul(x, a) {split} k = Mul(p, q) z = Mul(k, g) y = MatMul(z, b) }}"""
    halves = {"halves": np.array([8, 8])} if "halves" in split else {}
    after, _ = _eliminate(graphs, text, FEEDS, g=GATE, **_weights(a=(4, 16), b=(8, 5)), **halves)
    assert graphs.shapes(after) == {"a": (4, 10), "g": (5,), "b": (5, 5)}


def test_one_key_head_serves_whatever_queries_are_left(graphs):
    after, _ = _attend(graphs, 4, 1, [0, 3])
    assert {name: graphs.shapes(after)[name] for name in "qk"} == {"q": (4, 4), "k": (4, 2)}

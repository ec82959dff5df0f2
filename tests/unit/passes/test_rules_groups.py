"""What goes by groups: grouped convolutions, norms of channels, heads on the last axis. Before / expected."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.passes.graph_text import assert_becomes, blocked_by, eliminate, whole

ALL = None
EMPTY = "it would be empty: one channel has to stay"


def gate(*dead: int, of: int, axes: int = 0) -> np.ndarray:
    """Channel i has the gate i + 1 / 2, or 0; so many axes follow."""
    return np.array([0.0 if i in dead else i + 0.5 for i in range(of)]).reshape(-1, *(1,) * axes)


CONVOLVED = """(float[N,3,S] x) => (float[N,2,T] y) {
    h = Conv(x, a) z = Mul(h, f) k = Conv<group=GROUP>(z, w, c) v = Mul(k, g) y = Conv(v, b)
}"""
"""Convolutions of 8 channels in 4 groups between two that mix all channels."""


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_a_group_goes_with_its_data_and_its_weights(operator: str) -> None:
    text = CONVOLVED.replace("k = Conv", f"k = {operator}")
    weights = {
        **{"a": (8, 3, 1), "f": gate(of=8, axes=1), "w": (8, 2, 3), "c": (8,)},
        **{"g": gate(2, 3, 4, 5, of=8, axes=1), "b": (2, 8, 1)},
    }
    left = [0, 1, 6, 7]
    kept = {
        **{"a": (left, ALL, ALL), "f": (left, ALL), "w": (left, ALL, ALL), "c": (left,)},
        **{"g": (left, ALL), "b": (ALL, left, ALL)},
    }
    result = assert_becomes(text.replace("GROUP", "4"), text.replace("GROUP", "2"), weights, kept)
    assert result.blocked == ()


def test_groups_lose_as_many_of_the_channels_they_make() -> None:
    """One of 4 groups of 2 is removed, two lose different channels, and the last must lose one for an equal number."""
    text = CONVOLVED.replace("GROUP", "2")
    made = {"a": (8, 3, 1), "f": gate(of=8, axes=1), "w": (8, 4, 1), "c": (8,), "b": (2, 8, 1)}
    left = [1, 2, 3, 4, 5, 7]
    kept = {
        **{"a": (ALL,) * 3, "f": (ALL, ALL), "w": (left, ALL, ALL), "c": (left,)},
        **{"g": (left, ALL), "b": (ALL, left, ALL)},
    }
    assert_becomes(text, text, made | {"g": gate(0, 6, of=8, axes=1)}, kept)
    result = eliminate(text, made | {"g": gate(0, 6, 7, of=8, axes=1)})
    assert [a.tolist() for a in result.kept["w"] if a is not None] == [left]
    assert blocked_by(result) == [("v", 1, 1, "Conv", "its groups need the same size")]


def test_groups_lose_the_same_channels_of_their_data() -> None:
    """Channel 1 of both groups is zero; channel 2 only of the first, and its place in the weight stays."""
    text = CONVOLVED.replace("GROUP", "2")
    weights = {
        **{"a": (8, 3, 1), "f": gate(1, 2, 5, of=8, axes=1), "w": (8, 4, 1), "c": (8,)},
        **{"g": gate(of=8, axes=1), "b": (2, 8, 1)},
    }
    left = [0, 2, 3, 4, 6, 7]
    kept = {
        **{"a": (left, ALL, ALL), "f": (left, ALL), "w": (ALL, [0, 2, 3], ALL), "c": (ALL,)},
        **{"g": (ALL, ALL), "b": (ALL, ALL, ALL)},
    }
    result = assert_becomes(text, text, weights, kept)
    assert blocked_by(result) == [("z", 1, 1, "Conv", "its groups lose the same channels")]


def test_transposed_groups_lose_as_many_of_their_data_and_the_same_of_what_they_make() -> None:
    text = CONVOLVED.replace("k = Conv<group=GROUP>", "k = ConvTranspose<group=2, strides=[2]>")
    weights = {
        **{"a": (8, 3, 1), "f": gate(1, 6, of=8, axes=1), "w": (8, 4, 3), "c": (8,)},
        **{"g": gate(1, 2, 5, of=8, axes=1), "b": (2, 8, 1)},
    }
    data, made = [0, 2, 3, 4, 5, 7], [0, 2, 3, 4, 6, 7]
    kept = {
        **{"a": (data, ALL, ALL), "f": (data, ALL), "w": (data, [0, 2, 3], ALL), "c": (made,)},
        **{"g": (made, ALL), "b": (ALL, made, ALL)},
    }
    result = assert_becomes(text, text, weights, kept)
    assert [(b.value, b.channels, b.reason) for b in result.blocked] == [("v", 1, "its groups lose the same channels")]


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_a_convolution_of_zeros_is_its_bias(operator: str) -> None:
    """Group 0 of the data is zero, and so is all of its bias but channel 1: only that stays."""
    text = CONVOLVED.replace("k = Conv", f"k = {operator}").replace("GROUP", "2")
    bias = np.array([0.0, 1, 0, 0, 1, 1, 0, 1])
    weights = {
        **{"a": (8, 3, 1), "f": gate(0, 1, 2, 3, of=8, axes=1), "w": (8, 4, 1), "c": bias},
        **{"g": gate(of=8, axes=1), "b": (2, 8, 1)},
    }
    result = eliminate(text, weights)
    stuck = "its groups need the same size" if operator == "Conv" else "its groups lose the same channels"
    assert ("v", 1, 3, operator, stuck) in blocked_by(result)


def test_an_instance_norm_treats_each_channel_by_itself() -> None:
    text = """(float[N,3,S] x) => (float[N,2,S] y) {
        h = Conv(x, a) n = InstanceNormalization(h, s, t) z = Mul(n, g) y = Conv(z, b)
    }"""
    weights = {"a": (4, 3, 1), "s": (4,), "t": (4,), "g": gate(1, 2, of=4, axes=1), "b": (2, 4, 1)}
    left = [0, 3]
    kept = {"a": (left, ALL, ALL), "s": (left,), "t": (left,), "g": (left, ALL), "b": (ALL, left, ALL)}
    assert_becomes(text, text, weights, kept)
    # Zero channels are still zero behind it where its bias is.
    gated = """(float[N,3,S] x) => (float[N,2,S] y) {
        h = Conv(x, a) k = Mul(h, g) n = InstanceNormalization(k, s, t) z = Relu(n) y = Conv(z, b)
    }"""
    result = eliminate(gated, weights | {"t": np.array([1.0, 0, 1, 1])})
    assert [a.tolist() for a in result.kept["b"] if a is not None] == [[0, 2, 3]]


def test_a_group_norm_loses_whole_groups() -> None:
    """Channels 0, 1 and 4 of three groups of 2 are not needed."""
    text = """(float[N,3,S] x) => (float[N,2,S] y) {
        h = Conv(x, a) n = GroupNormalization<num_groups=3>(h, s, t) z = Mul(n, g) y = Conv(z, b)
    }"""
    expected = text.replace("num_groups=3", "num_groups=2")
    weights = {"a": (6, 3, 1), "s": (6,), "t": (6,), "g": gate(0, 1, 4, of=6, axes=1), "b": (2, 6, 1)}
    left = [2, 3, 4, 5]
    kept = {"a": (left, ALL, ALL), "s": (left,), "t": (left,), "g": (left, ALL), "b": (ALL, left, ALL)}
    result = assert_becomes(text, expected, weights, kept)
    assert blocked_by(result) == [("z", 1, 1, "GroupNormalization", "its group takes the mean over it")]


HEADS = """(float[N,S,3] x) => (float[N,S,2] y) {
    q0 = MatMul(x, q) k0 = MatMul(x, k) v0 = MatMul(x, v)
    w = Attention<q_num_heads=QUERIES, kv_num_heads=KEYS, is_causal=1>(q0, k0, v0) z = Mul(w, g) y = MatMul(z, o)
}"""


def heads_text(queries: int, keys: int) -> str:
    return HEADS.replace("QUERIES", str(queries)).replace("KEYS", str(keys))


def channels_of(heads: list[int]) -> list[int]:
    """Heads of 2 channels."""
    return [2 * head + i for head in heads for i in range(2)]


@pytest.mark.parametrize(
    ("keys", "dead", "queries_left", "keys_left"),
    [
        (4, [1, 3], [0, 2], [0, 2]),
        (2, [0, 1], [2, 3], [1]),
        (2, [1, 2], [0, 3], [0, 1]),  # each group loses one
        (1, [0, 2, 3], [1], [0]),
    ],
)
def test_heads_on_the_last_axis(keys: int, dead: list[int], queries_left: list[int], keys_left: list[int]) -> None:
    weights = {"q": (3, 8), "k": (3, keys * 2), "v": (3, keys * 2), "o": (8, 2)}
    weights["g"] = gate(*channels_of(dead), of=8)
    queries, own = channels_of(queries_left), channels_of(keys_left)
    kept = {"q": (ALL, queries), "k": (ALL, own), "v": (ALL, own), "g": (queries,), "o": (queries, ALL)}
    expected = heads_text(len(queries_left), len(keys_left))
    assert assert_becomes(heads_text(4, keys), expected, weights, kept).blocked == ()


def test_half_a_head_and_half_a_group_stay_and_say_so() -> None:
    weights = {"q": (3, 8), "k": (3, 4), "v": (3, 4), "g": gate(0, 1, 4, of=8), "o": (8, 2)}
    blocked = whole(heads_text(4, 2), weights, ["q", "o"])
    assert {(b.value, b.axis, b.channels, b.operator, b.reason) for b in blocked} == {
        ("z", 2, 2, "Attention", "another head of its group has to stay"),
        ("z", 2, 1, "Attention", "the rest of its head has to stay"),
    }


def test_heads_whose_values_are_zero_go() -> None:
    values = np.random.default_rng(2).normal(size=(3, 4)) * np.array([0.0, 0, 1, 1])
    text = heads_text(4, 2).replace("z = Mul(w, g)", "z = Tanh(w)")
    weights = {"q": (3, 8), "k": (3, 4), "v": values, "o": (8, 2)}
    queries = channels_of([2, 3])
    kept = {"q": (ALL, queries), "k": (ALL, [2, 3]), "v": (ALL, [2, 3]), "o": (queries, ALL)}
    expected = heads_text(2, 1).replace("z = Mul(w, g)", "z = Tanh(w)")
    assert_becomes(text, expected, weights, kept)


CACHED = """(float[N,S,3] x, float[N,4,P,2] pk, float[N,4,P,2] pv INPUTS) => (float[N,S,2] y OUTPUTS) {
    q0 = MatMul(x, q) k0 = MatMul(x, k) v0 = MatMul(x, v) BEFORE
    w, nk, nv = Attention<q_num_heads=4, kv_num_heads=4>(q0, k0, v0, , ck, cv) AFTER z = Mul(w, g) y = MatMul(z, o)
}"""
CACHES = {"q": (3, 8), "k": (3, 8), "v": (3, 8), "g": gate(2, 3, of=8), "o": (8, 2)}


def test_caches_of_the_caller_keep_all_heads_and_say_so() -> None:
    text = CACHED.replace("OUTPUTS", ", float[N,4,T,2] nk, float[N,4,T,2] nv").replace("AFTER", "")
    text = text.replace("INPUTS", "").replace("BEFORE", "").replace("ck", "pk").replace("cv", "pv")
    (only,) = whole(text, CACHES, ["q", "k", "v", "o"])
    assert (only.value, only.channels, only.operator) == ("z", 2, "Attention")
    assert only.reason == "it is an input or output of the model"


def test_caches_within_the_model_lose_heads() -> None:
    """The caches come from a table of positions, and what is made of them is summed up."""
    text = CACHED.replace("float[N,4,P,2] pk, float[N,4,P,2] pv", "int64[1,4] c").replace("INPUTS", "")
    text = text.replace("N,", "1,").replace("OUTPUTS", ", float[1,1,T,2] s")
    text = text.replace("AFTER", "n = Mul(nk, f) s = ReduceSum(n, axis)")
    text = text.replace("BEFORE", "e = Gather(t, c) ck = Transpose<perm=[0,2,1,3]>(e) cv = Relu(ck)")
    more = {"t": (7, 4, 2), "f": gate(1, of=4, axes=2), "axis": np.array([1])}
    left, heads = [0, 1, 4, 5, 6, 7], [0, 2, 3]
    kept = {
        **{"q": (ALL, left), "k": (ALL, left), "v": (ALL, left), "g": (left,), "o": (left, ALL)},
        **{"t": (ALL, heads, ALL), "f": (heads, ALL, ALL), "axis": (ALL,)},
    }
    expected = text.replace("num_heads=4", "num_heads=3")
    result = assert_becomes(text, expected, CACHES | more, kept)
    assert result.blocked == ()


def test_rotated_heads_on_the_last_axis() -> None:
    text = """(float[N,S,3] x, int64[N,S] at) => (float[N,S,2] y) {
        q0 = MatMul(x, q) r = RotaryEmbedding<num_heads=3>(q0, cos, sin, at) z = Mul(r, g) y = MatMul(z, o)
    }"""
    angles = np.random.default_rng(1).normal(size=(9, 2))
    weights = {"q": (3, 12), "cos": np.cos(angles), "sin": np.sin(angles), "o": (12, 2)}
    left = [*range(4), *range(8, 12)]
    kept = {"q": (ALL, left), "cos": (ALL, ALL), "sin": (ALL, ALL), "g": (left,), "o": (left, ALL)}
    result = assert_becomes(
        text, text.replace("num_heads=3", "num_heads=2"), weights | {"g": gate(0, 4, 5, 6, 7, of=12)}, kept
    )
    assert blocked_by(result) == [("z", 2, 1, "RotaryEmbedding", "it rotates the channels of a head")]

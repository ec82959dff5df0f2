"""Operators that compute: elementwise, products, reductions, norms, attention, convolution. Before / expected."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.passes.graph_text import assert_becomes, blocked_by, eliminate, whole

GATE = np.array([1.0, 0.0, 2.0, 0.0])  # channels 1 and 3 are dead
LEFT = [0, 2]
ALL = None


def test_gate_between_two_matrices() -> None:
    text = "(float[N,3] x) => (float[N,2] y) { h = MatMul(x, a) z = Mul(h, g) y = MatMul(z, b) }"
    kept = {"a": (ALL, LEFT), "g": (LEFT,), "b": (LEFT, ALL)}
    result = assert_becomes(text, text, {"a": (3, 4), "g": GATE, "b": (4, 2)}, kept)
    assert result.blocked == ()


def test_a_gate_of_ones_and_zeros_disappears() -> None:
    before = "(float[N,3] x) => (float[N,2] y) { h = MatMul(x, a) z = Mul(h, g) y = MatMul(z, b) }"
    expected = "(float[N,3] x) => (float[N,2] y) { h = MatMul(x, a) y = MatMul(h, b) }"
    weights = {"a": (3, 4), "g": np.array([0.0, 1.0, 1.0, 0.0]), "b": (4, 2)}
    assert_becomes(before, expected, weights, {"a": (ALL, [1, 2]), "b": ([1, 2], ALL)})


def test_broadcasting_over_other_axes_and_axes_of_one() -> None:
    text = """(float[N,S,3] x, float[N,1,1] s) => (float[N,S,2] y) {
        h = MatMul(x, a) i = Add(h, c) j = Mul(i, s) k = Sigmoid(j) z = Mul(g, k) y = MatMul(z, b)
    }"""
    weights = {"a": (3, 4), "c": (1, 4), "g": GATE.reshape(1, 1, 4), "b": (4, 2)}
    kept = {"a": (ALL, LEFT), "c": (ALL, LEFT), "g": (ALL, ALL, LEFT), "b": (LEFT, ALL)}
    assert_becomes(text, text, weights, kept)


def test_where_cuts_condition_and_branches() -> None:
    text = """(float[N,3] x) => (float[N,2] y) {
        p = MatMul(x, a) q = MatMul(x, e) c = Less(p, t) w = Where(c, p, q) z = Mul(w, g) y = MatMul(z, b)
    }"""
    weights = {"a": (3, 4), "e": (3, 4), "t": (4,), "g": GATE, "b": (4, 2)}
    kept = {"a": (ALL, LEFT), "e": (ALL, LEFT), "t": (LEFT,), "g": (LEFT,), "b": (LEFT, ALL)}
    assert_becomes(text, text, weights, kept)


@pytest.mark.parametrize(
    ("body", "zero"),
    [
        ("d = Clip(z, low, high)", True),
        ("d = Clip(z, one, high)", False),
        ("d = CastLike(z, low)", True),
        ("d = PRelu(z, s)", True),
        ("d = Div(z, s)", True),
        ("d = Sub(z, z)", True),
        ("d = Exp(z)", False),
        ("d = Pow(z, s)", False),
        ("d = Trilu(z)", True),
        ("d = Where(c, z, z)", True),
    ],
)
def test_what_maps_zero_to_zero(body: str, zero: bool) -> None:
    """The zeros of `z` cannot go, because the input stays; whether `d` has them too is in the report."""
    text = "(float[N,4] x, bool[N,1] c) => (float[N,2] y) { z = Mul(x, g) " + body + " y = MatMul(d, b) }"
    weights = {
        "g": GATE,
        "b": (4, 2),
        "s": np.array([1.0, 2.0, 3.0, 4.0]),
        "low": np.array(-0.5),
        "high": np.array(0.5),
        "one": np.array(0.25),
    }
    result = eliminate(text, weights)
    assert result.kept["b"] == (ALL, ALL)  # the input of the model stays whole
    assert any(b.channels == 2 and b.reason == "it is an input or output of the model" for b in result.blocked)
    assert any(b.value == "d" for b in result.blocked) is zero


def test_batched_matmul_with_a_batch_of_heads() -> None:
    """Head 1 of four is asked for by nobody: it goes from both operands, along the batch axis of the product."""
    text = "(float[N,3] x) => (float[4,N,2] y) { q = MatMul(x, a) k = MatMul(q, e) z = Mul(k, g) y = MatMul(z, o) }"
    weights = {"a": (4, 3, 5), "e": (4, 5, 6), "g": np.array([1.0, 0, 0, 1, 1, 0]), "o": (4, 6, 2)}
    kept = {"a": (ALL,) * 3, "e": (ALL, ALL, [0, 3, 4]), "g": ([0, 3, 4],), "o": (ALL, [0, 3, 4], ALL)}
    expected = "(float[N,3] x) => (float[4,N,2] y) { q = MatMul(x, a) k = MatMul(q, e) y = MatMul(k, o) }"
    kept.pop("g")
    assert_becomes(text, expected, weights, kept)
    reduced = """(float[N,3] x) => (float[N,5] y) <int64[1] first = {0}> {
        q = MatMul(x, a) z = Mul(q, g) y = ReduceSum<keepdims=0>(z, first)
    }"""
    heads = np.array([1.0, 0, 2, 3]).reshape(4, 1, 1)
    kept = {"a": ([0, 2, 3], ALL, ALL), "g": ([0, 2, 3], ALL, ALL)}
    assert_becomes(reduced, reduced, {"a": (4, 3, 5), "g": heads}, kept)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [(4,), (1, 4), (1,), ()])
def test_gemm(trans_a: int, trans_b: int, bias: tuple[int, ...]) -> None:
    """The first Gemm makes the channels, the second contracts them: transposed or not, with and without a full bias."""
    text = f"""(float[3,2] x) => (float[2,5] y) {{
        h = Gemm<transA=1, transB={trans_b}, alpha=0.5>(x, a, c)
        z = Mul(h, g) t = Transpose<perm={"[1,0]" if trans_a else "[0,1]"}>(z)
        y = Gemm<transA={trans_a}, transB={trans_b}, beta=2.0>(t, b, d)
    }}"""
    turn = slice(None, None, -1 if trans_b else 1)
    weights = {"a": (3, 4)[turn], "c": bias, "g": GATE, "b": (4, 5)[turn], "d": (5,)}
    kept = {"a": (ALL, LEFT)[turn], "g": (LEFT,), "b": (LEFT, ALL)[turn], "d": (ALL,)}
    kept["c"] = tuple(LEFT if n == 4 else ALL for n in bias)
    assert_becomes(text, text, weights, kept)


def test_a_sum_spares_zeros_a_mean_does_not() -> None:
    sums = "(float[N,3] x) => (float[N] y) <int64[1] last = {1}> { h = MatMul(x, a) z = Mul(h, g) y = REDUCE }"
    weights = {"a": (3, 4), "g": GATE}
    for operator in ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"):
        text = sums.replace("REDUCE", f"{operator}<keepdims=0>(z, last)")
        assert_becomes(text, text, weights, {"a": (ALL, LEFT), "g": (LEFT,)})
    for operator in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp"):
        result = eliminate(sums.replace("REDUCE", f"{operator}<keepdims=0>(z, last)"), weights)
        assert blocked_by(result) == [("z", 1, 2, operator, "it reduces over this axis")]


def test_zeros_pass_through_a_mean_over_another_axis() -> None:
    text = """(float[N,3,S] x) => (float[N,2] y) <int64[1] last = {-1}> {
        z = Mul(x, g) m = ReduceMean<keepdims=0>(z, last) n = Identity(m) y = MatMul(n, b)
    }"""
    result = eliminate(text, {"g": np.array([[1.0], [0.0], [3.0]]), "b": (3, 2)})
    assert ("m", 1, 1, "Mul", "it is an input or output of the model") in blocked_by(result)


@pytest.mark.parametrize(
    ("norm", "inputs"),
    [("LayerNormalization", "z, s, t"), ("RMSNormalization", "z, s"), ("Softmax", "z"), ("LogSoftmax", "z")],
)
def test_norms_keep_their_axis_and_say_so(norm: str, inputs: str) -> None:
    text = (
        f"(float[N,3] x) => (float[N,2] y) {{ h = MatMul(x, a) z = Mul(h, g) n = {norm}({inputs}) y = MatMul(n, b) }}"
    )
    weights = {"a": (3, 4), "g": GATE, "s": (4,), "t": (4,), "b": (4, 2)}
    (only,) = whole(text, weights, ["a", "b"])
    why = "it works along this axis" if "Softmax" in norm else "a norm over fewer channels gives other values"
    assert (only.value, only.axis, only.channels, only.operator, only.reason) == ("z", 1, 2, norm, why)


def test_channels_beside_the_axis_of_a_norm_go() -> None:
    text = """(float[N,3] x) => (float[N,6] y) <int64[3] split = {0, 4, 6}, int64[1] axis = {1}> {
        h = MatMul(x, a) r = Reshape(h, split) n = Softmax(r) z = Mul(n, g) y = ReduceSum<keepdims=0>(z, axis)
    }"""
    expected = text.replace("{0, 4, 6}", "{0, 2, 6}")
    heads = np.array([1.0, 0, 3, 0]).reshape(4, 1)
    columns = [*range(6), *range(12, 18)]
    assert_becomes(text, expected, {"a": (3, 24), "g": heads}, {"a": (ALL, columns), "g": (LEFT, ALL)})


@pytest.mark.parametrize(("kv_heads", "left"), [(4, [0, 2]), (2, [1]), (1, [0])])
def test_attention_goes_by_groups(kv_heads: int, left: list[int]) -> None:
    """Query heads 0 and 1 of four are dead with two key heads, 1 and 3 with four, none with one."""
    dead = {4: [1, 3], 2: [0, 1], 1: []}[kv_heads]
    heads = np.array([0.0 if head in dead else 1.5 for head in range(4)]).repeat(2)

    def text(queries: int, keys: int, merged: int) -> str:
        return f"""(float[N,S,3] x) => (float[N,S,2] y)
            <int64[4] wide = {{0,0,{queries},2}}, int64[4] by_key = {{0,0,{keys},2}},
             int64[3] merge = {{0,0,{merged}}}> {{
            q0 = MatMul(x, q) k0 = MatMul(x, k) v0 = MatMul(x, v)
            q1 = Reshape(q0, wide) k1 = Reshape(k0, by_key) v1 = Reshape(v0, by_key)
            q2 = Transpose<perm=[0,2,1,3]>(q1) k2 = Transpose<perm=[0,2,1,3]>(k1) v2 = Transpose<perm=[0,2,1,3]>(v1)
            w = Attention<is_causal=1>(q2, k2, v2)
            w1 = Transpose<perm=[0,2,1,3]>(w) w2 = Reshape(w1, merge) z = Mul(w2, g) y = MatMul(z, o)
        }}"""

    before = text(4, kv_heads, -1)
    weights = {"q": (3, 8), "k": (3, kv_heads * 2), "v": (3, kv_heads * 2), "g": heads, "o": (8, 2)}
    if not dead:
        assert whole(before, weights, list(weights)) == ()
        return
    queries = [head for head in range(4) if head not in dead]
    channels = [2 * head + i for head in queries for i in range(2)]
    keys = [2 * head + i for head in left for i in range(2)]
    kept = {"q": (ALL, channels), "k": (ALL, keys), "v": (ALL, keys), "g": (channels,), "o": (channels, ALL)}
    assert_becomes(before, text(len(queries), len(left), len(channels)), weights, kept)


def test_a_dead_query_head_waits_for_its_group() -> None:
    text = """(float[N,4,S,2] q, float[N,2,S,2] k, float[N,S,3] x) => (float[N,S,2] y)
        <int64[4] by_key = {0, 0, 2, 2}, int64[3] merge = {0, 0, -1}> {
        v0 = MatMul(x, v) v1 = Reshape(v0, by_key) v2 = Transpose<perm=[0,2,1,3]>(v1)
        w = Attention(q, k, v2) w1 = Transpose<perm=[0,2,1,3]>(w) w2 = Reshape(w1, merge)
        z = Mul(w2, g) y = MatMul(z, o)
    }"""
    weights = {"v": (3, 4), "g": np.array([0.0, 0, 1, 1, 1, 1, 1, 1]), "o": (8, 2)}
    whole(text, weights, ["v", "o"])


def test_convolution_and_batch_norm() -> None:
    text = """(float[N,3,8,8] x) => (float[N,2,6,6] y) {
        h = Conv<pads=[1,1,1,1]>(x, a, c) n = BatchNormalization(h, s, t, m, v) r = Relu(n)
        p = MaxPool<kernel_shape=[2,2]>(r) z = Mul(p, g) d = Conv<group=4, pads=[1,1,1,1]>(z, w)
        y = Conv<kernel_shape=[2,2]>(d, b)
    }"""
    expected = text.replace("group=4", "group=2")
    weights = {
        "a": (4, 3, 3, 3),
        "c": (4,),
        **dict.fromkeys("stm", (4,)),
        "v": np.array([1.0, 2, 3, 4]),
        "g": GATE.reshape(4, 1, 1),
        "w": (4, 1, 3, 3),
        "b": (2, 4, 2, 2),
    }
    kept = {
        name: (LEFT, *(ALL,) * (np.ndim(w) - 1 if isinstance(w, np.ndarray) else len(w) - 1))
        for name, w in weights.items()
    }
    kept["b"] = (ALL, LEFT, ALL, ALL)
    assert_becomes(text, expected, weights, kept)


@pytest.mark.parametrize(
    ("first", "second"),
    [("nsc,chd->nhsd", "nhsd,hde->nse"), ("nsc, chd -> shnd", "shnd, hde -> nse"), ("...c,chd->...hd", None)],
)
def test_einsum_by_its_letters(first: str, second: str | None) -> None:
    """Two of three heads and the middle of three channels of each: letters that are summed over spare zeros."""
    text = f"""(float[N,S,2] x) => (float[N,S,5] y) {{
        h = Einsum<equation="{first}">(x, a) z = Mul(h, g) i = Mul(z, f)
        y = Einsum<equation="{second or "nshd,hde->nse"}">(i, b)
    }}"""
    heads, channels = np.array([0.0, 2, 3]), np.array([1.5, 0, 2])
    shape = {"nsc,chd->nhsd": (3, 1, 1), "nsc, chd -> shnd": (3, 1, 1)}.get(first, (3, 1))
    weights = {"a": (2, 3, 3), "g": heads.reshape(shape), "f": channels, "b": (3, 3, 5)}
    if second is None:
        assert {b.reason for b in whole(text, weights, ["a", "b"])} == {"axes behind an ellipsis have no letter"}
        return
    kept = {
        **{"a": (ALL, [1, 2], [0, 2]), "g": ([1, 2], ALL, ALL), "f": ([0, 2],)},
        **{"b": ([1, 2], [0, 2], ALL)},
    }
    assert assert_becomes(text, text, weights, kept).blocked == ()


def test_einsum_of_one_operand_and_without_an_arrow() -> None:
    text = """(float[N,3] x) => (float[N] y) {
        h = MatMul(x, a) z = Mul(h, g) y = Einsum<equation="nc->n">(z)
    }"""
    assert_becomes(text, text, {"a": (3, 4), "g": GATE}, {"a": (ALL, LEFT), "g": (LEFT,)})
    product = text.replace("float[N] y", "float[N,2] y").replace('"nc->n">(z)', '"bj,jk">(z, b)')
    kept = {"a": (ALL, LEFT), "g": (LEFT,), "b": (LEFT, ALL)}
    assert_becomes(product, product, {"a": (3, 4), "g": GATE, "b": (4, 2)}, kept)


def test_a_diagonal_blocks() -> None:
    text = """(float[3,4] x) => (float[4] y) {
        h = Gemm<transA=1>(x, a) z = Mul(h, g) y = Einsum<equation="ii->i">(z)
    }"""
    (only,) = whole(text, {"a": (3, 4), "g": GATE}, ["a"])
    assert (only.operator, only.channels, only.reason) == ("Einsum", 2, "a repeated letter is a diagonal")


QUANTIZED = """(float[N,3] x) => (float[N,2] y) {
    h = MatMul(x, a) z = Mul(h, g) q = QuantizeLinear(z, s, p) d = DequantizeLinear(q, t, p) y = MatMul(d, b)
}"""


@pytest.mark.parametrize(
    ("kind", "scale", "points"),
    [
        (np.int8, np.array(0.05), np.array(0)),
        (np.uint8, np.array(0.05), np.array(128)),
        (np.int8, np.array([0.05, 0.02, 0.03, 0.04]), np.array([3, -1, 0, 7])),
        (np.int16, np.array([0.001, 0.002, 0.003, 0.004]), np.zeros(4)),
    ],
)
def test_zeros_stay_zero_through_quantization(kind: type, scale: np.ndarray, points: np.ndarray) -> None:
    """They are stored as the zero point; scales and zero points per channel go with their channels."""
    weights = {"a": (3, 4), "g": GATE, "s": scale, "t": scale, "p": points.astype(kind), "b": (4, 2)}
    vector = (LEFT,) if scale.ndim else ()
    kept = {"a": (ALL, LEFT), "g": (LEFT,), "s": vector, "t": vector, "p": vector, "b": (LEFT, ALL)}
    assert_becomes(QUANTIZED, QUANTIZED, weights, kept)


def test_another_zero_point_makes_something_of_zeros() -> None:
    text = QUANTIZED.replace("(q, t, p)", "(q, t, r)")
    one = {"s": np.array(0.1), "t": np.array(0.1), "p": np.array(3, np.int8), "r": np.array(2, np.int8)}
    result = eliminate(text, {"a": (3, 4), "g": GATE, "b": (4, 2)} | one)
    assert blocked_by(result) == [("z", 1, 2, "MatMul", "its channels are not zero")]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("per_channel", [False, True])
def test_stored_zeros_of_a_quantized_weight_are_its_zero_point(axis: int, per_channel: bool) -> None:
    """The weight that makes the channels is quantized along them, or along its rows, or as a whole."""
    text = """(float[N,3] x) => (float[N,2] y) {
        w = DequantizeLinear<axis=AXIS>(q, s, p) h = MatMul(x, w) y = MatMul(h, b)
    }""".replace("AXIS", str(axis))
    size = (3, 4)[axis]
    points = np.arange(5, 5 + size) if per_channel else np.array(5)
    stored = np.random.default_rng(1).integers(20, 90, (3, 4))
    spread = points.reshape((-1, 1) if axis == 0 and per_channel else (-1,)) * np.ones((3, 4), np.int64)
    stored[:, [1, 3]] = spread[:, [1, 3]]
    scales = np.linspace(0.05, 0.1, size) if per_channel else np.array(0.05)
    weights = {"q": stored.astype(np.uint8), "s": scales, "p": points.astype(np.uint8), "b": (4, 2)}
    vector = () if not per_channel else (LEFT,) if axis == 1 else (ALL,)
    kept = {"q": (ALL, LEFT), "s": vector, "p": vector, "b": (LEFT, ALL)}
    result = eliminate(text, weights)
    assert {n: [None if a is None else a.tolist() for a in axes] for n, axes in result.kept.items()} == {
        name: list(axes) for name, axes in kept.items()
    }


def test_a_block_of_quantized_channels_goes_as_a_whole() -> None:
    """Blocks of 2 rows share their scales: rows 0 and 1 go, row 4 stays with row 5."""
    text = """(float[N,3] x) => (float[N,2] y) {
        h = MatMul(x, a) z = Mul(h, g) w = DequantizeLinear<axis=0, block_size=2>(q, s) y = MatMul(z, w)
    }"""
    rng = np.random.default_rng(1)
    weights = {
        **{"a": (3, 6), "g": np.array([0.0, 0, 1, 2, 0, 3]), "s": rng.uniform(0.05, 0.1, (3, 2))},
        **{"q": rng.integers(-90, 90, (6, 2)).astype(np.int8)},
    }
    left = [2, 3, 4, 5]
    kept = {"a": (ALL, left), "g": (left,), "q": (left, ALL), "s": ([1, 2], ALL)}
    result = assert_becomes(text, text, weights, kept)
    assert blocked_by(result) == [("z", 1, 1, "DequantizeLinear", "a block shares its scale")]


@pytest.mark.parametrize("operator", ["DynamicQuantizeLinear", "MatMulInteger"])
def test_quantization_without_a_rule_blocks_by_name(operator: str) -> None:
    text = """(float[N,3] x) => (int32[N,2] y) {
        h = MatMul(x, a) z = Mul(h, g) PRODUCT
    }""".replace(
        "PRODUCT",
        "q, s, p = DynamicQuantizeLinear(z) y = MatMulInteger(q, w, p)"
        if operator[0] == "D"
        else "q = QuantizeLinear(z, s, p) y = MatMulInteger(q, w, p)",
    )
    weights = {"a": (3, 4), "g": GATE, "w": np.arange(8, dtype=np.int8).reshape(4, 2)}
    if operator[0] == "M":
        weights |= {"s": np.array(0.1), "p": np.array(0, np.uint8)}
    blocked = whole(text, weights, ["a", "w"])
    assert ("z", f"there is no rule for {operator}") in {(b.value, b.reason) for b in blocked}

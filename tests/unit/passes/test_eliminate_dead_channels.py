"""One case per operator family: which parameters get how small, that values stay, and why channels stay.

GATE has 8 channels, of which 0, 3 and 4 are zero: 5 are left.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels
from cpcompile.passes.opset import OpsetError

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
WHOLE = {"a": (4, 8), "g": (8,), "b": (8, 5)}


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


def _through(body, inputs="float[N,4] x", output="float[N,5] y"):
    """h = x a, then `body` from h to k, then the gate and y = (k * g) b."""
    return f"({inputs}) => ({output}) {{ h = MatMul(x, a) {body} z = Mul(k, g) y = MatMul(z, b) }}"


def test_before_and_expected(graphs):
    text = _through("k = Relu(h)")
    after, result = _eliminate(graphs, text, FEEDS, g=GATE, **LINEAR)
    expected = graphs.build(text, g=GATE[LEFT], a=LINEAR["a"][:, LEFT], b=LINEAR["b"][LEFT])
    assert graphs.operators(after) == graphs.operators(expected)
    for name, value in expected.graph.initializers.items():
        np.testing.assert_array_equal(after.graph.initializers[name].const_value.numpy(), value.const_value.numpy())
    assert {name: [None if c is None else c.tolist() for c in axes] for name, axes in result.kept.items()} == {
        "a": [None, LEFT],
        "b": [LEFT, None],
        "g": [LEFT],
    }
    assert result.blocked == ()


ELEMENTWISE = [
    *("Abs", "Cast <to = 1>", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSwish", "Identity", "LeakyRelu"),
    *("Mish", "Neg", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tanh"),
]


@pytest.mark.parametrize("operator", ELEMENTWISE)
def test_elementwise_operators_let_channels_through(graphs, operator):
    name, _, attributes = operator.partition(" ")
    after, _ = _eliminate(graphs, _through(f"k = {name} {attributes} (h)"), FEEDS, g=GATE, **LINEAR)
    assert graphs.shapes(after) == CUT


@pytest.mark.parametrize(
    "body",
    [
        "k = Add(h, v)",
        "k = Sub(v, h)",
        "k = Mul(h, v)",
        "k = Div(h, v)",
        "k = Max(h, v)",
        "k = Pow(h, two) unused = Neg(v)",
        "k = Clip(h, low, high)",
        "k = CastLike(h, x)",
        "p = Less(h, v) k = Where(p, h, v)",
        "s = Sigmoid(h) k = Mul(h, s)",
        "k = Add(h, one)",
    ],
)
def test_operators_on_two_operands_let_channels_through(graphs, body):
    constants = {
        "v": np.arange(1.0, 9.0),
        "two": np.array(2.0),
        "low": np.array(-1.0),
        "high": np.array(1.0),
        "one": np.ones((1, 1)),
    }
    after, _ = _eliminate(graphs, _through(body), FEEDS, g=GATE, **LINEAR, **constants)
    assert {name: graphs.shapes(after)[name] for name in CUT} == CUT
    assert graphs.shapes(after).get("v", (5,)) == (5,)


@pytest.mark.parametrize(
    "after_gate", ["Neg(z)", "Relu(z)", "Sqrt(z)", "Tanh(z)", "Div(z, v)", "Mul(z, z)", "Cast <to = 1> (z)"]
)
def test_zeros_stay_zeros_through_operators_that_map_zero_to_zero(graphs, after_gate):
    text = f"""(float[N,4] x) => (float[N,5] y) {{
        r = MatMul(x, a) h = Abs(r) z = Mul(h, g) k = {after_gate} y = MatMul(k, b) }}"""
    after, _ = _eliminate(graphs, text, FEEDS, g=GATE, v=np.arange(1.0, 9.0), two=np.array(2.0), **LINEAR)
    assert {name: graphs.shapes(after)[name] for name in CUT} == CUT


@pytest.mark.parametrize("after_gate", ["Exp(z)", "Sigmoid(z)", "Cos(z)", "Add(z, v)", "Pow(z, zero)"])
def test_zeros_that_do_not_stay_zero_are_kept(graphs, after_gate):
    text = f"""(float[N,4] x) => (float[N,5] y) {{
        h = MatMul(x, a) z = Mul(h, g) k = {after_gate} y = MatMul(k, b) }}"""
    after, result = _eliminate(graphs, text, FEEDS, g=GATE, v=np.arange(1.0, 9.0), zero=np.array(0.0), **LINEAR)
    assert {name: graphs.shapes(after)[name] for name in WHOLE} == WHOLE
    assert {(b.value, b.operator, b.channels) for b in result.blocked} == {("z", "MatMul", 3)}


def test_a_sum_is_zero_only_where_both_terms_are(graphs):
    other = np.where(np.arange(8) < 4, 0.0, 2.0)  # zero in 0 to 3; with GATE both are zero in 0 and 3
    text = """(float[N,4] x) => (float[N,5] y) {
        h = MatMul(x, a) p = Mul(h, g) k = MatMul(x, a2) q = Mul(k, g2) s = Add(p, q) y = MatMul(s, b) }"""
    after, _ = _eliminate(graphs, text, FEEDS, g=GATE, g2=other, **_weights(a=(4, 8), a2=(4, 8), b=(8, 5)))
    assert graphs.shapes(after) == {"a": (4, 6), "a2": (4, 6), "g": (6,), "g2": (6,), "b": (6, 5)}


def test_gemm_and_its_bias(graphs):
    text = """(float[N,4] x) => (float[N,5] y) {
        h = Gemm <transB = 1> (x, a, c) z = Mul(h, g) y = Gemm <alpha = 0.5> (z, b, d) }"""
    after, _ = _eliminate(graphs, text, FEEDS, g=GATE, **_weights(a=(8, 4), c=(8,), b=(8, 5), d=(5,)))
    assert graphs.shapes(after) == {"a": (5, 4), "c": (5,), "g": (5,), "b": (5, 5), "d": (5,)}


def test_zero_columns_of_a_weight_are_dead_without_a_gate(graphs):
    weights = _weights(a=(4, 8), b=(8, 5))
    weights["a"][:, [0, 3]] = 0
    weights["b"][[4], :] = 0
    text = "(float[N,4] x) => (float[N,5] y) { h = MatMul(x, a) y = MatMul(h, b) }"
    after, _ = _eliminate(graphs, text, FEEDS, **weights)
    assert graphs.shapes(after) == {"a": (4, 5), "b": (5, 5)}


def test_reduce_sum_spares_zeros_and_reduce_mean_does_not(graphs):
    text = "(float[N,4] x) => (float[N] y) {{ h = MatMul(x, a) z = Mul(h, g) y = {} <keepdims = 0> (z, axis) }}"
    sums, _ = _eliminate(graphs, text.format("ReduceSum"), FEEDS, g=GATE, axis=np.array([1]), **_weights(a=(4, 8)))
    assert graphs.shapes(sums) == {"a": (4, 5), "g": (5,)}
    mean, result = _eliminate(
        graphs, text.format("ReduceMean"), FEEDS, g=GATE, axis=np.array([1]), **_weights(a=(4, 8))
    )
    assert graphs.shapes(mean) == {"a": (4, 8), "g": (8,)}
    assert [(b.operator, b.reason, b.channels) for b in result.blocked] == [
        ("ReduceMean", "it reduces over this axis", 3)
    ]


def test_a_reduction_over_no_axes_is_a_copy(graphs):
    text = """(float[N,4] x) => (float[N,5] y) {
        h = MatMul(x, a) k = ReduceSum <noop_with_empty_axes = 1> (h) z = Mul(k, g) y = MatMul(z, b) }"""
    after, _ = _eliminate(graphs, text, FEEDS, g=GATE, **LINEAR)
    assert graphs.shapes(after) == CUT


@pytest.mark.parametrize(
    ("body", "operator", "reason"),
    [
        ("k = Softmax <axis = -1> (h)", "Softmax", "works along this axis"),
        ("k = LayerNormalization (h, v)", "LayerNormalization", "norm over fewer channels"),
        ("k = CumSum(h, one)", "CumSum", "no rule for CumSum"),
        ("r = Shape(h) s = Expand(zero, r) t = Cast <to = 1> (s) k = Add(h, t)", "Shape", "length is read"),
    ],
)
def test_refusals_say_which_operator_and_why(graphs, body, operator, reason):
    constants = {"v": np.arange(1.0, 9.0), "one": np.array(1), "zero": np.array([0])}
    after, result = _eliminate(graphs, _through(body), FEEDS, g=GATE, **LINEAR, **constants)
    assert {name: graphs.shapes(after)[name] for name in WHOLE} == WHOLE
    (blocked,) = [b for b in result.blocked if b.value == "z"]
    assert (blocked.axis, blocked.channels, blocked.operator) == (1, 3, operator)
    assert reason in blocked.reason


def test_rms_normalization_blocks_its_axis(graphs):
    after, result = _eliminate(
        graphs, _through("k = RMSNormalization (h, v)"), FEEDS, opset=23, g=GATE, v=np.arange(1.0, 9.0), **LINEAR
    )
    assert graphs.shapes(after) == {**WHOLE, "v": (8,)}
    assert {b.operator for b in result.blocked} == {"RMSNormalization"}


def test_another_domain_blocks(graphs):
    model = graphs.build(_through("k = Relu(h)"), g=GATE, **LINEAR)
    relu = next(node for node in model.graph if node.op_type == "Relu")
    relu.domain = "com.example"
    relu.outputs[0].shape = ir.Shape(["N", 8])  # nobody can infer it
    model.graph.opset_imports["com.example"] = 1
    result = EliminateDeadChannels()(model)
    assert graphs.shapes(model) == WHOLE
    assert "no rule for Relu" in {b.reason for b in result.blocked}.pop()


def test_a_subgraph_blocks_what_it_captures(graphs):
    text = """(float[N,4] x, bool c) => (float[N,5] y, float[N,8] w) {
        h = MatMul(x, a) z = Mul(h, g) y = MatMul(z, b)
        w = If (c) <then_branch = t () => (float[N,8] p) { p = Neg(h) },
                    else_branch = e () => (float[N,8] q) { q = Abs(h) }>
    }"""
    after, result = _eliminate(graphs, text, {**FEEDS, "c": np.array(True)}, g=GATE, **LINEAR)
    assert graphs.shapes(after) == WHOLE
    assert [b.operator for b in result.blocked] == ["If"]


@pytest.mark.parametrize("name", ["g", "b"])
def test_an_input_with_a_default_is_no_constant(graphs, name):
    inputs = {"g": "float[8] g", "b": "float[8,5] b"}[name]
    feeds = {**FEEDS, name: np.ones((8,) if name == "g" else (8, 5), np.float32)}
    after, _ = _eliminate(graphs, _through("k = Relu(h)", f"float[N,4] x, {inputs}"), feeds, g=GATE, **LINEAR)
    assert graphs.shapes(after) == WHOLE


def test_a_zero_default_is_not_taken_for_a_zero_term(graphs):
    text = "(float[N,4] x, float[4] z) => (float[N,4] y) { h = Neg(x) k = Add(h, z) y = Relu(k) }"
    after, _ = _eliminate(graphs, text, {**FEEDS, "z": np.full(4, 9, np.float32)}, z=np.zeros(4))
    assert graphs.operators(after) == ["Neg", "Add", "Relu"]


@pytest.mark.parametrize(
    ("body", "sizes"),
    [
        # channels that are not asked for go as well
        ("k = Slice(h, four, twelve, axis)", (4, 5)),
        ("k = Gather <axis = 1> (h, even)", (4, 5)),
        ("k = Gather <axis = 1> (h, twice)", (4, 5)),
        ("r = Reshape(h, pairs) k = ReduceSum <keepdims = 0> (r, last)", (4, 10)),
        (
            "r = Reshape(h, pairs) t = Transpose <perm = [0, 2, 1]> (r) s = Gather <axis = 1> (t, first) k = Neg(s)",
            (4, 5),
        ),
    ],
)
def test_operators_that_move_channels(graphs, body, sizes):
    constants = {
        "halves": np.array([8, 8]),
        "four": np.array([4]),
        "twelve": np.array([12]),
        "axis": np.array([1]),
        "even": np.arange(0, 16, 2),
        "twice": np.array([3, 3, 5, 7, 7, 9, 11, 15]),
        "pairs": np.array([0, 8, 2]),
        "last": np.array([2]),
        "first": np.array(0),
    }
    used = {name: array for name, array in constants.items() if name in body}
    after, _ = _eliminate(graphs, _through(body), FEEDS, g=GATE, **_weights(a=(4, 16), b=(8, 5)), **used)
    shapes = graphs.shapes(after)
    assert shapes["b"] == (5, 5)
    # Rows 3 and 7 are picked twice: one place of row 3 is alive, so it stays; row 7 goes.
    assert shapes["a"] == sizes


@pytest.mark.parametrize(
    ("first", "second"),
    [("Unsqueeze", "Squeeze"), ("Reshape", "Reshape"), ("Flatten", "Reshape"), ("Transpose", "Transpose")],
)
def test_there_and_back(graphs, first, second):
    there = {
        "Unsqueeze": "u = Unsqueeze(h, one)",
        "Reshape": "u = Reshape(h, split)",
        "Flatten": "u = Flatten(h)",
        "Transpose": "u = Transpose(h)",
    }[first]
    back = {"Squeeze": "k = Squeeze(u, one)", "Reshape": "k = Reshape(u, flat)", "Transpose": "k = Transpose(u)"}[
        second
    ]
    constants = {"one": np.array([1]), "split": np.array([0, 1, 8]), "flat": np.array([-1, 8])}
    used = {name: array for name, array in constants.items() if f"{name})" in there + back}
    after, _ = _eliminate(graphs, _through(f"{there} {back}"), FEEDS, g=GATE, **LINEAR, **used)
    assert graphs.shapes(after) == CUT


def test_squeeze_of_an_unknown_shape_is_left_alone(graphs):
    text = _through("u = Unsqueeze(h, one) k = Squeeze(u)")
    after, _ = _eliminate(graphs, text, FEEDS, g=GATE, one=np.array([1]), **LINEAR)
    assert graphs.shapes(after) == WHOLE


HEADS = """(float[B,S,4] x) => (float[B,S,5] y) {{
    h = MatMul(x, a) r = Reshape(h, split) t = Transpose <perm = [0, 2, 1, 3]> (r)
    {}
    back = Transpose <perm = [0, 2, 1, 3]> (k) f = Reshape(back, merge) y = MatMul(f, b) }}"""
HEAD_SHAPES = {"split": np.array([0, 0, 8, 6]), "merge": np.array([0, 0, 48])}


def test_a_head_goes_with_all_its_channels(graphs):
    after, result = _eliminate(
        graphs,
        HEADS.format("k = Mul(t, g)"),
        SEQUENCE,
        g=GATE.reshape(8, 1, 1),
        **_weights(a=(4, 48), b=(48, 5)),
        **HEAD_SHAPES,
    )
    assert graphs.shapes(after) == {"a": (4, 30), "g": (5, 1, 1), "b": (30, 5)}
    channels = np.arange(48).reshape(8, 6)[LEFT].reshape(-1)
    np.testing.assert_array_equal(result.kept["a"][1], channels)
    np.testing.assert_array_equal(result.kept["b"][0], channels)


def test_a_channel_goes_if_it_is_dead_in_every_head(graphs):
    gate = np.array([1.0, 0.0, 2.0, 0.0, 0.0, 3.0])
    after, _ = _eliminate(
        graphs, HEADS.format("k = Mul(t, g)"), SEQUENCE, g=gate, **_weights(a=(4, 48), b=(48, 5)), **HEAD_SHAPES
    )
    assert graphs.shapes(after) == {"a": (4, 24), "g": (3,), "b": (24, 5)}


def test_merged_channels_that_do_not_fill_a_head_stay_and_say_so(graphs):
    text = """(float[B,S,4] x) => (float[B,S,5] y) {
        h = MatMul(x, a) r = Reshape(h, split) k = Neg(r) f = Reshape(k, merge) z = Mul(f, g) y = MatMul(z, b) }"""
    gate = np.ones(48)
    gate[[0, 1, 2, 3, 4, 5, 20]] = 0  # the whole of head 0 and one channel of head 3
    after, result = _eliminate(graphs, text, SEQUENCE, g=gate, **_weights(a=(4, 48), b=(48, 5)), **HEAD_SHAPES)
    assert graphs.shapes(after) == {"a": (4, 42), "g": (42,), "b": (42, 5)}
    assert {(b.value, b.channels, b.operator) for b in result.blocked} == {("z", 1, "Reshape")}
    assert "regroups channels" in result.blocked[0].reason


def test_heads_merged_with_the_batch_can_still_be_told_apart(graphs):
    body = """z = Mul(t, g) ss = Shape <start = 1, end = 2> (x) sb = Shape <start = 0, end = 1> (x)
        to = Concat <axis = 0> (minus, ss, six) m = Reshape(z, to) n = Neg(m)
        from = Concat <axis = 0> (sb, eight, ss, six) k = Reshape(n, from)"""
    sizes = {"minus": np.array([-1]), "six": np.array([6]), "eight": np.array([8])}
    after, _ = _eliminate(
        graphs,
        HEADS.format(body),
        SEQUENCE,
        g=GATE.reshape(8, 1, 1),
        **_weights(a=(4, 48), b=(48, 5)),
        **HEAD_SHAPES,
        **sizes,
    )
    assert graphs.shapes(after) == {"a": (4, 30), "g": (5, 1, 1), "b": (30, 5)}


def test_axes_regroup_where_neither_divides_the_other(graphs):
    text = """(float[N,4] x) => (float[N,5] y) {
        h = MatMul(x, a) r = Reshape(h, split) z = Mul(r, g) f = Reshape(z, merge) y = MatMul(f, b) }"""
    gate = np.array([0.0, 1.0, 2.0, 0.0, 3.0, 4.0]).reshape(6, 1)
    after, _ = _eliminate(
        graphs,
        text,
        FEEDS,
        g=gate,
        split=np.array([0, 6, 4]),
        merge=np.array([0, 24]),
        **_weights(a=(4, 24), b=(24, 5)),
    )
    assert graphs.shapes(after) == {"a": (4, 16), "g": (4, 1), "b": (16, 5)}


def test_expand_repeats_groups_and_follows_its_shape(graphs):
    """Four key heads, each repeated twice: grouped queries as exporters spell them out."""
    text = """(float[B,S,4] x) => (float[B,S,5] y) {
        h = MatMul(x, a) r = Reshape(h, split) u = Unsqueeze(r, three)
        sb = Shape <start = 0, end = 1> (x) ss = Shape <start = 1, end = 2> (x)
        wide = Concat <axis = 0> (sb, ss, four, two, six) e = Expand(u, wide)
        f = Reshape(e, merge) z = Mul(f, g) y = MatMul(z, b) }"""
    gate = np.repeat([1.0, 0.0, 0.0, 2.0], 12)
    sizes = {"three": np.array([3]), "four": np.array([4]), "two": np.array([2]), "six": np.array([6])}
    after, _ = _eliminate(
        graphs,
        text,
        SEQUENCE,
        g=gate,
        split=np.array([0, 0, 4, 6]),
        merge=np.array([0, 0, 48]),
        **sizes,
        **_weights(a=(4, 24), b=(48, 5)),
    )
    assert graphs.shapes(after) == {"a": (4, 12), "g": (24,), "b": (24, 5)}


def test_a_length_that_can_be_read_nowhere_else_keeps_the_channels(graphs):
    text = """(float[4] x, bool[4] c, float[1,4] v) => (float[U,5] y) {
        i = Compress <axis = 0> (x, c) n = Shape(i) wide = Concat <axis = 0> (n, eight)
        h = MatMul(v, a) e = Expand(h, wide) z = Mul(e, g) y = MatMul(z, b) }"""
    feeds = {
        "x": np.arange(4, dtype=np.float32),
        "c": np.array([True, False, True, True]),
        "v": np.ones((1, 4), np.float32),
    }
    after, result = _eliminate(graphs, text, feeds, g=GATE, eight=np.array([8]), **LINEAR)
    assert graphs.shapes(after) == WHOLE
    assert {(b.operator, b.channels) for b in result.blocked if b.value == "z"} == {("Expand", 3)}


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


@pytest.mark.parametrize(
    ("heads", "keys", "dead", "queries_left", "keys_left"),
    [
        (4, 4, [1, 2], 2, 2),
        (6, 3, [0, 1], 4, 2),
        (6, 3, [0, 1, 2], 4, 2),  # head 2 stays with its group
        (6, 3, [0, 3], 6, 3),
    ],
)
def test_attention_ties_query_heads_to_their_key_head(graphs, heads, keys, dead, queries_left, keys_left):
    after, result = _attend(graphs, heads, keys, dead)
    assert {n: s for n, s in graphs.shapes(after).items() if n in "qkvb"} == {
        "q": (4, queries_left * 2),
        "k": (4, keys_left * 2),
        "v": (4, keys_left * 2),
        "b": (queries_left * 2, 5),
    }
    stuck = len(dead) - (heads - queries_left)
    assert sum(b.channels for b in result.blocked if b.value == "z") == stuck * 2


@pytest.mark.parametrize("mask", ["float[B,1,S,S] m", "float[S,S] m"])
def test_attention_with_a_mask_for_all_heads(graphs, mask):
    shape = (2, 1, 3, 3) if "B" in mask else (3, 3)
    bias = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    after, _ = _attend(graphs, 4, 4, [1, 2], "o = Attention (q2, k2, v2, m)", inputs=f", {mask}", feeds={"m": bias})
    assert graphs.shapes(after)["q"] == (4, 4)


def test_a_cache_that_the_caller_holds_keeps_all_heads(graphs):
    past = np.random.default_rng(1).normal(size=(2, 4, 5, 2)).astype(np.float32)
    after, result = _attend(
        graphs,
        4,
        4,
        [1, 2],
        "o, pk, pv = Attention <is_causal = 1> (q2, k2, v2, , kc, vc)",
        inputs=", float[B,4,P,2] kc, float[B,4,P,2] vc",
        outputs=", float[B,4,T,2] pk, float[B,4,T,2] pv",
        feeds={"kc": past, "vc": past},
    )
    assert graphs.shapes(after)["q"] == (4, 8)
    assert sum(b.channels for b in result.blocked if b.value == "z") == 4


def test_zero_values_make_a_head_zero_without_a_gate(graphs):
    weights = _weights(q=(4, 8), k=(4, 8), v=(4, 8), b=(8, 5))
    weights["v"][:, 2:4] = 0
    text = ATTENTION.format(attention="o = Attention (q2, k2, v2)", inputs="", outputs="")
    after, _ = _eliminate(
        graphs, text, SEQUENCE, opset=23, g=np.full(8, 2.0), qs=np.array([0, 0, 4, 2]), ks=np.array([0, 0, 4, 2]),
        merge=np.array([0, 0, 8]), **weights,
    )  # fmt: skip
    assert graphs.shapes(after) == {"q": (4, 6), "k": (4, 6), "v": (4, 6), "g": (6,), "b": (6, 5)}


def test_rotary_embedding_ties_heads(graphs):
    angles = np.random.default_rng(1).normal(size=(9, 3))
    body = "rot = RotaryEmbedding (t, cos, sin, positions) k = Mul(rot, g)"
    text = HEADS.format(body).replace("float[B,S,4] x", "float[B,S,4] x, int64[B,S] positions")
    after, _ = _eliminate(
        graphs,
        text,
        {**SEQUENCE, "positions": np.array([[0, 1, 2], [4, 5, 6]])},
        opset=23,
        g=GATE.reshape(8, 1, 1),
        cos=np.cos(angles),
        sin=np.sin(angles),
        **_weights(a=(4, 48), b=(48, 5)),
        **HEAD_SHAPES,
    )
    assert {n: s for n, s in graphs.shapes(after).items() if n in "agb"} == {"a": (4, 30), "g": (5, 1, 1), "b": (30, 5)}


@pytest.mark.parametrize("sum_", ["Add(x, d)", "Add(d, x)", "Sub(x, d)"])
def test_a_dead_residual_branch_disappears_with_its_parameters(graphs, sum_):
    text = f"""(float[N,4] x) => (float[N,4] y) {{
        h = MatMul(x, a) z = Mul(h, g) d = MatMul(z, b) s = {sum_} y = Relu(s) }}"""
    after, result = _eliminate(graphs, text, FEEDS, g=np.zeros(8), **_weights(a=(4, 8), b=(8, 4)))
    assert graphs.operators(after) == ["Relu"]
    assert result.kept == {}


def test_zero_minus_x_is_its_negative(graphs):
    text = """(float[N,4] x) => (float[N,4] y) {
        h = MatMul(x, a) z = Mul(h, g) d = MatMul(z, b) s = Sub(d, x) y = Relu(s) }"""
    after, _ = _eliminate(graphs, text, FEEDS, g=np.zeros(8), **_weights(a=(4, 8), b=(8, 4)))
    assert graphs.operators(after) == ["Neg", "Relu"]


def test_a_zero_term_that_widens_the_sum_stays(graphs):
    text = "(float[1,4] x, float[N,4] w) => (float[N,4] y) { d = Mul(w, zero) s = Add(x, d) y = Relu(s) }"
    feeds = {"x": np.ones((1, 4), np.float32), "w": np.ones((3, 4), np.float32)}
    after, _ = _eliminate(graphs, text, feeds, zero=np.zeros(4))
    assert "Add" in graphs.operators(after)


def test_a_shared_vector_stays_one_where_the_needs_are_the_same(graphs):
    text = """(float[N,4] x) => (float[N,5] y) {
        h = MatMul(x, a) k = Mul(h, s) t = Tanh(k) m = Mul(t, s) z = Mul(m, g) y = MatMul(z, b) }"""
    after, _ = _eliminate(graphs, text, FEEDS, g=GATE, s=np.arange(1.0, 9.0), **LINEAR)
    assert graphs.shapes(after) == {**CUT, "s": (5,)}


def test_a_matrix_that_two_branches_share_is_never_copied(graphs):
    text = """(float[N,4] x) => (float[N,5] y, float[N,8] w) {
        h = MatMul(x, a) z = Mul(h, g) y = MatMul(z, b) w = MatMul(x, a) }"""
    after, result = _eliminate(graphs, text, FEEDS, g=GATE, **LINEAR)
    assert graphs.shapes(after) == WHOLE
    assert len(result.blocked) == 1


def test_a_node_that_nothing_needs_does_not_block(graphs):
    text = """(float[N,4] x) => (float[N,5] y) {
        h = MatMul(x, a) spare = CumSum(h, one) z = Mul(h, g) y = MatMul(z, b) }"""
    after, _ = _eliminate(graphs, text, FEEDS, g=GATE, one=np.array(1), **LINEAR)
    assert graphs.shapes(after) == CUT


def test_a_graph_without_zeros_is_left_alone(graphs):
    before = graphs.build(_through("k = Relu(h)"), g=np.arange(1.0, 9.0), **LINEAR)
    after = before.clone()
    result = EliminateDeadChannels()(after)
    assert not result.modified
    assert graphs.shapes(after) == WHOLE


def test_old_opsets_are_left_alone_with_the_reason(graphs):
    model = graphs.build(_through("k = Relu(h)"), opset=11, g=GATE, **LINEAR)
    before = ir.to_proto(model)
    with pytest.raises(OpsetError, match="opset 11"):
        EliminateDeadChannels()(model)
    assert ir.to_proto(model) == before
    assert graphs.shapes(model) == WHOLE

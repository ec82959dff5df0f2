"""Channels that go into, through and out of the subgraphs of If, Loop and Scan. Before / expected."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels
from tests.unit.passes.graph_text import assert_becomes, blocked_by, eliminate, parse

ALL = None
GATE = np.array([1.5, 0.0, 2.0, 0.0])
LEFT = [0, 2]
CHOICE = """(float[N,3] x, bool c) => (float[N,2] y) {
    h = MatMul(x, a) z = Mul(h, g)
    u = If(c)<then_branch = t () => (float[N,5] p) { k = Relu(z) p = MatMul(k, b) },
              else_branch = e () => (float[N,5] q) { q = MatMul(z, d) }>
    v = Mul(u, f) y = MatMul(v, o)
}"""


def test_what_a_branch_reads_and_makes_loses_channels() -> None:
    """Two channels die before the If, two of what both branches make are not needed behind it."""
    weights = {"a": (3, 4), "g": GATE, "b": (4, 5), "d": (4, 5), "f": np.array([1.0, 0, 0, 2, 3]), "o": (5, 2)}
    made = [0, 3, 4]
    kept = {
        **{"a": (ALL, LEFT), "g": (LEFT,), "b": (LEFT, made), "d": (LEFT, made)},
        **{"f": (made,), "o": (made, ALL)},
    }
    result = assert_becomes(CHOICE, CHOICE.replace("float[N,5]", "float[N,3]"), weights, kept)
    assert result.blocked == ()


def test_what_both_branches_make_zero_is_zero() -> None:
    b, d = np.ones((4, 5)), np.ones((4, 5))
    b[:, [0, 1]], d[:, [1, 2]] = 0, 0
    weights = {"a": (3, 4), "g": GATE, "b": b, "d": d, "f": np.ones(5) * 2, "o": (5, 2)}
    made = [0, 2, 3, 4]
    result = eliminate(CHOICE, weights)
    assert [a.tolist() for a in result.kept["o"] if a is not None] == [made]


def test_what_only_one_branch_spares_stays_and_says_so() -> None:
    text = CHOICE.replace("q = MatMul(z, d)", "j = CumSum(z, last) q = MatMul(j, d)")
    weights = {"a": (3, 4), "g": GATE, "b": (4, 5), "d": (4, 5), "f": np.ones(5) * 2, "o": (5, 2), "last": np.array(1)}
    result = eliminate(text, weights)
    assert all(axis is None for axes in result.kept.values() for axis in axes)
    assert ("z", 1, 2, "CumSum", "there is no rule for CumSum") in blocked_by(result)


def test_a_dead_term_in_a_branch_goes_with_its_weights() -> None:
    before = CHOICE.replace("q = MatMul(z, d)", "i = MatMul(z, d) j = Mul(z, n) l = MatMul(j, d2) q = Add(i, l)")
    weights = {"a": (3, 4), "g": GATE + 1, "b": (4, 5), "d": (4, 5), "f": np.ones(5) * 2, "o": (5, 2)}
    kept = {name: (ALL,) * (1 if name in "fg" else 2) for name in weights}
    assert_becomes(before, CHOICE, weights | {"n": np.zeros(4), "d2": (4, 5)}, kept)


def test_a_branch_that_nothing_needs_does_not_hold_what_it_reads() -> None:
    """An operator without a rule reads the channels, in the body of an If whose result only a dead node uses."""
    before = """(float[N,3] x, bool c) => (float[N,2] y) {
        h = MatMul(x, a) z = Mul(h, g)
        u = If(c)<then_branch = t () => (float[N,4] p) { p = CumSum(z, one) },
                  else_branch = e () => (float[N,4] q) { i = If(c)<then_branch = r () => (float[N,4] m) { m = Neg(z) },
                      else_branch = s () => (float[N,4] n) { n = Neg(z) }> q = Relu(i) }>
        dead = Neg(u) y = MatMul(z, b)
    }"""
    expected = "(float[N,3] x, bool c) => (float[N,2] y) { h = MatMul(x, a) z = Mul(h, g) y = MatMul(z, b) }"
    kept = {"a": (ALL, LEFT), "g": (LEFT,), "b": (LEFT, ALL)}
    assert_becomes(before, expected, {"a": (3, 4), "g": GATE, "b": (4, 2), "one": np.array(1)}, kept)


LOOP = """(float[N,3] x) => (float[N,2] y SCANNED) <int64 times = {3}> {
    h = MatMul(x, a) s0 = Mul(h, g0)
    s, STACK = Loop(times, , s0)<body = l (int64 i, bool go, float[N,4] s1) => (bool on, float[N,4] s2, float[N,4] e) {
        on = Identity(go) m = MatMul(s1, w) n = Mul(m, g1) s2 = Add(n, s1) e = Relu(s2) }>
    z = Mul(s, g) y = MatMul(z, b) SUM
}"""


def test_a_state_loses_the_channels_that_no_iteration_needs() -> None:
    """Channel 1 is cut by its gate behind the loop, and within the loop nothing reads it but its own sum."""
    text = LOOP.replace("STACK", "all").replace("SCANNED", "").replace("SUM", "")
    w = np.random.default_rng(3).normal(size=(4, 4))
    w[1] = 0
    weights = {
        **{"a": (3, 4), "g0": np.array([1.0, 2, 3, 4]), "w": w, "g1": np.array([1.0, 2, 3, 4])},
        **{"g": np.array([1.0, 0, 2, 3]), "b": (4, 2)},
    }
    left = [0, 2, 3]
    kept = {"a": (ALL, left), "w": (left, left), "b": (left, ALL)} | dict.fromkeys(("g0", "g1", "g"), (left,))
    assert_becomes(text, text.replace("float[N,4]", "float[N,3]"), weights, kept)


def test_a_state_that_starts_and_stays_zero_is_zero_behind_the_loop() -> None:
    text = LOOP.replace("STACK", "all").replace("SCANNED", "").replace("SUM", "").replace("Add(n, s1)", "Tanh(n)")
    gates = dict.fromkeys(("g0", "g1"), GATE)
    weights = {"a": (3, 4), **gates, "w": (4, 4), "g": np.arange(1.0, 5.0), "b": (4, 2)}
    kept = {"a": (ALL, LEFT), "w": (LEFT, LEFT), "b": (LEFT, ALL)} | dict.fromkeys(("g0", "g1", "g"), (LEFT,))
    assert_becomes(text, text.replace("float[N,4]", "float[N,2]"), weights, kept)
    once = eliminate(text, weights | {"g1": np.arange(1.0, 5.0)})
    assert once.kept["b"] == (ALL, ALL)  # zero before the first iteration only


def test_what_a_loop_stacks_keeps_the_channels_that_are_needed() -> None:
    text = LOOP.replace("STACK", "stack").replace("SCANNED", ", float[T,N,2] t").replace("SUM", "t = MatMul(stack, o)")
    weights = {
        **{"a": (3, 4), "g0": GATE, "w": (4, 4), "g1": GATE, "g": np.arange(1.0, 5.0), "b": (4, 2), "o": (4, 2)},
    }
    result = eliminate(text.replace("e = Relu(s2)", "e = Mul(n, g2)"), weights | {"g2": np.array([0.0, 1, 2, 3])})
    assert [a.tolist() for a in result.kept["o"] if a is not None] == [[0, 2]]


def test_scan_ties_states_and_the_axes_beside_the_sequence() -> None:
    text = """(float[5,N,3] x, float[N,4] s0) => (float[N,5,2] y, float[N,4] s) {
        h = MatMul(x, a) z = Mul(h, g)
        s, all = Scan<num_scan_inputs=1, scan_output_axes=[1],
            body = l (float[N,4] s1, float[N,4] e) => (float[N,4] s2, float[N,4] f) {
            k = Relu(e) m = ReduceSum(k, last) s2 = Add(s1, m) f = Mul(e, g1) }>(s0, z)
        y = MatMul(all, b)
    }"""
    weights = {"a": (3, 4), "g": GATE, "g1": np.array([3.0, 2.0, 5.0, 4.0]), "b": (4, 2), "last": np.array([1])}
    kept = {"a": (ALL, LEFT), "g": (LEFT,), "g1": (LEFT,), "b": (LEFT, ALL), "last": (ALL,)}
    expected = text.replace("float[N,4] e", "float[N,2] e").replace("float[N,4] f", "float[N,2] f")
    result = assert_becomes(text, expected, weights, kept)
    assert result.blocked == ()


def test_weights_of_a_body_are_cut_too() -> None:
    weights = {"a": (3, 4), "g": GATE, "d": (4, 5), "f": np.ones(5) * 2, "o": (5, 2)}
    model = parse(CHOICE.replace("{ k = Relu", "<float[4,5] b = {" + ",".join("1" * 20) + "}> { k = Relu"), weights)
    result = EliminateDeadChannels()(model)
    (then,) = [graph for graph in model.graph.subgraphs() if graph.name == "t"]
    assert then.initializers["b"].shape == [2, 5]
    assert "b" not in result.kept
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_call_to_a_function_blocks() -> None:
    """Inline functions first: nothing is known of what they do with channels."""
    text = "(float[N,3] x) => (float[N,2] y) { h = MatMul(x, a) z = Mul(h, g) k = other.f(z) y = MatMul(k, b) }"
    model = parse(text, {"a": (3, 4), "g": GATE, "b": (4, 2)})
    result = EliminateDeadChannels()(model)
    assert not result.modified
    assert blocked_by(result) == [("z", 1, 2, "f", "there is no rule for f")]


def test_the_body_of_another_operator_keeps_its_borders_and_loses_channels_within() -> None:
    text = """(float[N,3] x) => (float[N,4] y) {
        h = MatMul(x, a) z = Mul(h, g)
        y = other.Apply<body = l (float[N,4] e) => (float[N,4] r) {
            k = MatMul(e, b) j = Mul(k, f) i = MatMul(j, d) r = Mul(i, g2) }>(z)
    }"""
    model = parse(text, {"a": (3, 4), "g": GATE, "b": (4, 4), "f": GATE, "d": (4, 4), "g2": GATE})
    result = EliminateDeadChannels()(model)
    cut = {name: [None if a is None else a.tolist() for a in axes] for name, axes in result.kept.items()}
    none = {"a": [ALL, ALL], "g": [ALL], "g2": [ALL]}
    assert cut == none | {"b": [ALL, LEFT], "f": [LEFT], "d": [LEFT, ALL]}
    assert {(b.value, b.operator, b.reason) for b in result.blocked} == {
        ("z", "Apply", "there is no rule for Apply"),
        ("r", "Apply", "there is no rule for Apply"),
    }

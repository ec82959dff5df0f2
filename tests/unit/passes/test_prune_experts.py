"""Experts that are masked are gone: rows of the router and slices of what is stacked; values stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from cpcompile.core.errors import UsageError
from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels
from cpcompile.passes.prune_experts import PruneExperts, Pruning, Router
from cpcompile.passes.remove_whole_gathers import RemoveWholeGathers
from tests.unit.passes.graph_text import Array, Weights, assert_same_values, canonical, parse, run, tensor

INF = -np.inf
KEPT = [1, 3, 4]
ADDED = np.array([INF, 0, INF, 0, 0, INF])
MASKED = np.isneginf(ADDED)
WEIGHTS: dict[str, tuple[int, ...] | Array] = {
    **{"router": (4, 6), "up": (6, 4, 8), "down": (6, 8, 4), "k": np.array([2]), "last": np.array([-1])},
    **{"added": ADDED, "masked": MASKED, "never": np.array(INF), "one": np.array([1])},
}
HEAD = "(float[N,4] x) => (float[N,4] y) {"
EXPERTS = """
    x2 = Unsqueeze(x, one) x3 = Unsqueeze(x2, one)
    u = Gather(up, ids) h = MatMul(x3, u) r = Relu(h)
    i = Unsqueeze(ids, last) d = GatherND(down, i) o = MatMul(r, d)
    w1 = Unsqueeze(w, last) w2 = Unsqueeze(w1, last) m = Mul(o, w2) s = ReduceSum <keepdims = 0> (m, sum)
    y = Add(x, s) }"""
SUM: Weights = {"sum": np.array([1, 2])}


def prune(text: str, weights: Weights) -> tuple[ir.Model, Pruning]:
    """The pass and what cuts after it, checked: same values, valid, and nothing left for a second run."""
    used = {name: weight for name, weight in {**weights, **SUM}.items() if name in text}
    original, model = parse(text, used), parse(text, used)
    result = PruneExperts()(model)
    assert isinstance(result, Pruning)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_same_values(original, model)
    EliminateDeadChannels()(model)
    for finish in (RemoveWholeGathers(), CleanUp()):
        finish(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_same_values(original, model)
    assert not any(again(model).modified for again in (PruneExperts(), RemoveWholeGathers(), EliminateDeadChannels()))
    return model, result


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("l = MatMul(x, router) a = Add(l, added) p = Softmax(a)", "l = MatMul(x, router) p = Softmax(l)"),
        ("l = MatMul(x, router) a = Where(masked, never, l) p = Softmax(a)", "l = MatMul(x, router) p = Softmax(l)"),
        ("l = MatMul(x, router) a = Where(open, l, never) p = Softmax(a)", "l = MatMul(x, router) p = Softmax(l)"),
        (  # what a mask in single precision becomes on the way
            "l = MatMul(x, router) a = Add(added, l) c = Cast <to = 1> (a) b = Where(masked, never, c) p = Softmax(b)",
            "l = MatMul(x, router) p = Softmax(l)",
        ),
    ],
)
def test_experts_that_are_masked_are_cut(before: str, after: str) -> None:
    rest = f"w, ids = TopK(p, k) {EXPERTS}"
    weights = {**WEIGHTS, "open": ~MASKED}
    model, result = prune(f"{HEAD} {before} {rest}", weights)
    assert result.routers == (Router(("router", "up", "down"), 6, 2, (1, 3, 4)),)
    assert (result.routers[0].removed, result.blocked) == ((0, 2, 5), ())
    original = parse(f"{HEAD} {before} {rest}", {**weights, **SUM}, infer=False)
    for name, axis in (("router", 1), ("up", 0), ("down", 0)):
        assert np.array_equal(tensor(model, name), tensor(original, name).take(KEPT, axis=axis))
    assert [node.op_type for node in model.graph if node.op_type not in ("Cast", "Add")] == [
        node.op_type for node in parse(f"{HEAD} {after} {rest}").graph if node.op_type not in ("Cast", "Add")
    ]


def test_the_graph_that_is_left() -> None:
    text = f"{HEAD} l = MatMul(x, router) a = Where(masked, never, l) q, ids = TopK(a, k) w = Softmax(q) {EXPERTS}"
    model, _ = prune(text, WEIGHTS)
    expected = parse(text.replace("a = Where(masked, never, l)", "").replace("TopK(a", "TopK(l"), {**WEIGHTS, **SUM})
    for value in model.graph.initializers.values():
        assert value.name in WEIGHTS | SUM
    assert [row[:1] for row in canonical(model)] == [row[:1] for row in canonical(expected)]


def test_a_bias_of_the_router_and_a_scale_per_expert_go_too() -> None:
    weights = {**WEIGHTS, "bias": (6,), "scale": (6,), "added": np.where(MASKED, INF, np.arange(6.0))}
    text = f"""{HEAD} g = Gemm(x, router, bias) a = Add(g, added) p = Softmax(a) v, ids = TopK(p, k)
        c = Gather(scale, ids) w = Mul(v, c) {EXPERTS}"""
    model, result = prune(text, weights)
    assert result.routers[0].parameters == ("router", "bias", "up", "down")
    left = {name: tensor(model, name).shape for name in ("router", "bias", "scale", "added", "up", "down")}
    assert left == {
        **{"router": (4, 3), "bias": (3,), "scale": (3,), "added": (3,)},
        **{"up": (3, 4, 8), "down": (3, 8, 4)},
    }
    assert tensor(model, "added").tolist() == KEPT


def test_two_routers_on_the_same_logits_and_weights() -> None:
    """A router that picks one and a router that picks two; the tables are looked up twice by each."""
    weights = {**WEIGHTS, "table": (6, 4), "first": np.array([1])}
    text = f"""{HEAD} l = MatMul(x, router) a = Add(l, added)
        v1, i1 = TopK(a, first) c1 = Gather(table, i1) d1 = Gather(table, i1)
        v2, i2 = TopK(a, k) c2 = Gather(table, i2)
        e1 = ReduceSum <keepdims = 0> (c1, one) e2 = ReduceSum <keepdims = 0> (d1, one)
        e3 = ReduceSum <keepdims = 0> (c2, one) y = Sum(x, e1, e2, e3) }}"""
    model, result = prune(text, weights)
    assert [(router.picked, router.kept) for router in result.routers] == [(1, (1, 3, 4)), (2, (1, 3, 4))]
    assert {name: tensor(model, name).shape for name in ("router", "table")} == {"router": (4, 3), "table": (3, 4)}


def test_as_many_as_are_picked_keep_their_rows_of_the_router() -> None:
    weights = {**WEIGHTS, "k": np.array([3])}
    model, result = prune(
        f"{HEAD} l = MatMul(x, router) a = Add(l, added) p = Softmax(a) w, ids = TopK(p, k) {EXPERTS}", weights
    )
    assert result.routers[0].kept == (1, 3, 4)
    assert tensor(model, "router").shape == (4, 3)


def test_more_picked_than_left() -> None:
    weights = {**WEIGHTS, "k": np.array([4])}
    text = f"{HEAD} l = MatMul(x, router) a = Add(l, added) p = Softmax(a) w, ids = TopK(p, k) {EXPERTS}"
    with pytest.raises(
        UsageError, match="router routes every token to 4 of 6 experts, and only 3 of them are not masked"
    ):
        PruneExperts()(parse(text, {**weights, **SUM}))


def test_a_mask_after_the_softmax_leaves_the_softmax_whole() -> None:
    text = f"{HEAD} l = MatMul(x, router) p = Softmax(l) a = Where(masked, never, p) w, ids = TopK(a, k) {EXPERTS}"
    model, result = prune(text, WEIGHTS)
    assert result.routers == (Router(("up", "down"), 6, 2, (1, 3, 4)),)
    assert tensor(model, "router").shape == (4, 6)
    assert tensor(model, "up").shape == (3, 4, 8)


def test_an_expert_whose_weight_underflows_adds_nothing_either_way() -> None:
    """Only expert 4 has a weight: TopK of the masked graph fills up with what is masked, and loses nothing."""
    weights = {**WEIGHTS, "added": np.where(MASKED, INF, [0, -1000.0, 0, -1000.0, 0, 0])}
    text = f"{HEAD} l = MatMul(x, router) a = Add(l, added) p = Softmax(a) w, ids = TopK(p, k) {EXPERTS}"
    ids = parse(text.replace("float[N,4] y)", "float[N,4] y, int64[N,2] ids)"), {**weights, **SUM})
    assert run(ids, {"x": np.ones((1, 4), dtype=np.float32)})["ids"].tolist() == [[4, 0]]
    assert prune(text, weights)[1].routers[0].kept == (1, 3, 4)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("l = MatMul(x, router) a = Add(l, added) w, ids = TopK(a, k) f = Cast <to = 1> (ids) y = Mul(w, f) }", "Mul"),
        ("l = MatMul(x, router) a = Add(l, added) w, y = TopK(a, k) }", "are the output 'y' of the model"),
        (
            "l = MatMul(x, router) a = Add(l, added) w, ids = TopK(a, k) y = GatherElements <axis = 1> (l, ids) }",
            "Elem",
        ),
    ],
)
def test_numbers_that_mean_something_keep_all_experts(body: str, reason: str) -> None:
    kind = "int64" if " y = TopK" in body else "float"
    used = {name: weight for name, weight in WEIGHTS.items() if name in body}
    model = parse(f"(float[N,4] x) => ({kind}[N,2] y) {{ {body}", used)
    before = canonical(model)
    result = PruneExperts()(model)
    assert isinstance(result, Pruning)
    assert not result.modified and canonical(model) == before
    (blocked,) = result.blocked
    assert (blocked.value, blocked.axis, blocked.channels, blocked.operator) == ("l", 1, 3, "TopK")
    assert reason in blocked.reason


@pytest.mark.parametrize(
    "choice",
    [
        "p = Softmax(l) w, ids = TopK(p, k)",  # nothing is masked
        "a = Add(l, added) w, ids = TopK <largest = 0> (a, k)",  # the smallest are picked
        "a = Sub(l, added) w, ids = TopK(a, k)",  # +inf is always picked
        "a = Add(l, added) b = Sigmoid(a) w, ids = TopK(b, k)",  # what it leaves is decided elsewhere
    ],
)
def test_what_is_not_masked_is_left_alone(choice: str) -> None:
    text = f"{HEAD} l = MatMul(x, router) {choice} {EXPERTS}"
    model = parse(text, {**WEIGHTS, **SUM})
    result = PruneExperts()(model)
    assert isinstance(result, Pruning)
    assert (result.modified, result.routers, result.blocked) == (False, (), ())

"""Runs of parameters: every context gets its own tensor back, every element is stored once, values stay."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from cpcompile.core.selection import Selection, UnitKind
from cpcompile.models.decoder import Decoder
from cpcompile.passes.freeze import Frozen, freeze
from cpcompile.passes.share_weights import Plan, ShareWeights, plan_runs
from tests.unit.passes.decoders import CONTEXTS, dynamic_graph, random_decoder
from tests.unit.passes.graph_text import Array, assert_same_values, parse, run, tensor


def rebuilt(plan: Plan, name: str, context: str, whole: Array) -> Array:
    """The tensor of a context, from the runs that it owns."""
    runs = [piece for piece in plan[name] if context in piece.contexts]
    pieces = [piece.cut(whole) for piece in runs]
    return pieces[0] if runs[0].axis is None else np.concatenate(pieces, axis=runs[0].axis)


SHAPES = {"a": (3, 8), "b": (8, 8), "w": (8, 8)}
"""Large enough for the channels that the small plans below name."""


def core_and_own(kv_heads: int) -> tuple[Decoder, Selection]:
    """A third of the FFN in the core, a fifth of it per context; heads: one for all, one for none, others by chance."""
    model = random_decoder(kv_heads, kv_heads)
    rng = np.random.default_rng(kv_heads)
    layers, units = model.config.layers, model.config.ffn // model.config.align
    ffn = np.zeros((3, layers, units), dtype=np.bool_)
    heads = rng.random((3, layers, kv_heads)) < 0.5
    for layer in range(layers):
        order = rng.permutation(units)
        ffn[:, layer, order[: units // 3]] = True
        for context in range(3):
            own = units // 3 + context * (units // 5)
            ffn[context, layer, order[own : own + units // 5]] = True
        order = rng.permutation(kv_heads)
        heads[:, layer, order[0]], heads[:, layer, order[1]] = True, False
    selection = model.sort_units(Selection(CONTEXTS, {UnitKind.FFN: ffn, UnitKind.HEAD: heads}))
    model.select(selection)
    return model, selection


@pytest.fixture(
    scope="module", params=[pytest.param((20, 4), marks=pytest.mark.slow), (23, 2)], ids=["opset20-kv4", "opset23-kv2"]
)
def shared(request: pytest.FixtureRequest) -> tuple[ir.Model, Mapping[str, Frozen], Plan, Selection]:
    """The dynamic graph, each context frozen, and the plan of their runs."""
    opset, kv_heads = request.param
    model, selection = core_and_own(kv_heads)
    dynamic = dynamic_graph(model, opset)
    frozen = {context: freeze(dynamic, index) for index, context in enumerate(CONTEXTS)}
    parameters = [name for name, _ in model.named_parameters() if not name.endswith("_gate.table")]
    kept = {c: {n: f.kept[n] for n in parameters if n in f.kept} for c, f in frozen.items()}
    some = frozen[CONTEXTS[0]]
    shapes = {name: original(dynamic, some, name).shape for channels in kept.values() for name in channels}
    return dynamic, frozen, plan_runs(kept, shapes), selection


def original(dynamic: ir.Model, frozen: Frozen, name: str) -> Array:
    """The whole parameter in the layout of the frozen graph."""
    array = tensor(dynamic, name)
    return array.transpose(frozen.permutations[name]) if name in frozen.permutations else array


def test_runs_rebuild_every_frozen_tensor(shared: tuple[ir.Model, Mapping[str, Frozen], Plan, Selection]) -> None:
    dynamic, frozen, plan, _ = shared
    for context, one in frozen.items():
        for name in plan:
            if name in one.model.graph.initializers:
                assert np.array_equal(
                    rebuilt(plan, name, context, original(dynamic, one, name)), tensor(one.model, name)
                )


def test_every_element_is_stored_at_most_once(
    shared: tuple[ir.Model, Mapping[str, Frozen], Plan, Selection],
) -> None:
    """Sorted by partition: as many runs as partitions, and together no larger than what some context keeps."""
    dynamic, frozen, plan, selection = shared
    for name, runs in plan.items():
        one = next(f for f in frozen.values() if name in f.model.graph.initializers)
        whole = original(dynamic, one, name)
        seen = np.zeros(whole.shape, dtype=np.int64)
        for piece in runs:
            axes = [np.arange(n) if k is None else k for k, n in zip(piece.kept, whole.shape, strict=True)]
            seen[np.ix_(*axes)] += 1
        assert seen.max() == 1
        assert len({piece.contexts for piece in runs}) == len(runs)
    for layer in range(2):
        union = selection.kept[UnitKind.FFN].any(axis=0)[layer].sum() * 16
        assert (
            sum(
                r.cut(original(dynamic, frozen["a"], f"layers.{layer}.ffn.up.weight")).size
                for r in plan[f"layers.{layer}.ffn.up.weight"]
            )
            == union * 64
        )


def test_the_graph_of_runs_computes_the_same(shared: tuple[ir.Model, Mapping[str, Frozen], Plan, Selection]) -> None:
    dynamic, frozen, plan, _ = shared
    ids = np.random.default_rng(0).integers(0, 512, (2, 9))
    for context, one in frozen.items():
        before = run(one.model, {"input_ids": ids})
        model = one.model.clone()
        assert ShareWeights(context, plan)(model).modified
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        after = run(model, {"input_ids": ids})
        assert list(after) == list(before)
        assert np.abs(after["logits"] - before["logits"]).max() <= 1e-5 * np.abs(before["logits"]).max()
        for name, piece in ((r.stored_name, r) for runs in plan.values() for r in runs if context in r.contexts):
            assert np.array_equal(tensor(model, name), piece.cut(original(dynamic, one, piece.name)))
        assert not ShareWeights(context, plan)(model).modified


TWO = "(float[N,3] x) => (float[N,K] y) { h = MatMul(x, a) r = Relu(h) v = MatMul(r, b) y = Neg(v) }"


def split(plan: Plan, context: str, weights: Mapping[str, Array]) -> tuple[ir.Model, ir.Model]:
    """The graph of a context before and after `ShareWeights`."""
    before = parse(TWO.replace("K", str(weights["b"].shape[1])), weights)
    after = before.clone()
    ShareWeights(context, plan)(after)
    return before, after


def test_outputs_are_joined_and_inputs_split_under_the_old_names() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 6)), rng.standard_normal((6, 2))
    left, right = np.array([0, 1, 2, 4]), np.array([0, 1, 3, 5])
    plan = plan_runs(
        {"p": {"a": (None, left), "b": (left, None)}, "q": {"a": (None, right), "b": (right, None)}}, SHAPES
    )
    assert [(r.contexts, r.kept[1].tolist(), r.stored_name) for r in plan["a"]] == [
        (("p", "q"), [0, 1], "a[0]"),
        (("p",), [2], "a[1]"),
        (("q",), [3], "a[2]"),
        (("p",), [4], "a[3]"),
        (("q",), [5], "a[4]"),
    ]
    before, after = split(plan, "p", {"a": a[:, left], "b": b[left]})
    assert_same_values(before, after)
    assert [node.op_type for node in after.graph] == [
        *["MatMul"] * 3,
        "Concat",
        "Relu",
        "Split",
        "MatMul",
        "MatMul",
        "Add",
        "MatMul",
        "Add",
        "Neg",
    ]
    made_before = {out.name for node in before.graph for out in node.outputs}
    assert made_before <= {out.name for node in after.graph for out in node.outputs}  # a value made anew keeps its name
    assert {n for n, v in after.graph.initializers.items() if v.dtype == ir.DataType.FLOAT} == {
        f"{name}[{i}]" for name in "ab" for i in (0, 1, 3)
    }


@pytest.mark.parametrize("axis", [0, 1])
def test_an_output_of_the_model_keeps_its_name(axis: int) -> None:
    first, second = np.array([0, 1, 2]), np.array([0, 1, 3])
    plan = plan_runs(
        {c: {"b": (None, own) if axis else (own, None)} for c, own in (("p", first), ("q", second))}, SHAPES
    )
    before = parse("(float[N,3] x) => (float[N,3] y) { y = MatMul(x, b) }", {"b": (3, 3)})
    after = before.clone()
    assert ShareWeights("p", plan)(after).modified
    assert_same_values(before, after)


def test_a_context_that_keeps_everything_shares_it() -> None:
    plan = plan_runs({"p": {"a": (None, None)}, "q": {"a": (None, np.array([0, 1]))}}, SHAPES)
    assert [r.contexts for r in plan["a"]] == [("p", "q"), ("p",)]


def test_one_run_needs_no_new_nodes() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 4)), rng.standard_normal((4, 2))
    own = np.array([2, 3])
    same = plan_runs({c: {"a": (None, None), "b": (None, None)} for c in "pq"}, SHAPES)
    before, after = split(same, "p", {"a": a, "b": b})
    assert [n.op_type for n in after.graph] == [n.op_type for n in before.graph]
    assert after.graph.initializers.keys() == before.graph.initializers.keys()
    disjoint = plan_runs(
        {"p": {"a": (None, own), "b": (own, None)}, "q": {"a": (None, own - 2), "b": (own - 2, None)}}, SHAPES
    )
    before, after = split(disjoint, "p", {"a": a[:, own], "b": b[own]})
    assert [n.op_type for n in after.graph] == [n.op_type for n in before.graph]
    assert set(after.graph.initializers) == {"a[1]", "b[1]"}
    assert_same_values(before, after)


def test_contexts_that_differ_on_two_axes_store_their_own() -> None:
    first, second = np.array([0, 1]), np.array([1, 2])
    plan = plan_runs({"p": {"a": (first, first)}, "q": {"a": (second, second)}}, SHAPES)
    assert [(r.contexts, r.axis, r.stored_name) for r in plan["a"]] == [(("p",), None, "a[0]"), (("q",), None, "a[1]")]
    whole = np.arange(9.0).reshape(3, 3)
    assert np.array_equal(rebuilt(plan, "a", "q", whole), [[4, 5], [7, 8]])


def test_a_parameter_that_is_no_matrix_is_joined_by_a_concat() -> None:
    text = "(float[N,3] x) => (float[N,3] y) { y = Mul(x, s) }"
    plan = plan_runs({"p": {"s": (np.array([0, 1, 2]),)}, "q": {"s": (np.array([0, 1]),)}}, {"s": (3,)})
    before = parse(text, {"s": np.array([1.0, 2, 3])})
    after = before.clone()
    assert ShareWeights("p", plan)(after).modified
    assert [node.op_type for node in after.graph] == ["Concat", "Mul"]
    assert_same_values(before, after)


def test_a_joined_parameter_stands_before_its_first_reader() -> None:
    text = "(float[N,3] x) => (float[N,3] y) { h = Mul(x, t) y = Add(h, s) }"
    plan = plan_runs({"p": {"s": (np.array([0, 1, 2]),)}, "q": {"s": (np.array([0, 1]),)}}, {"s": (3,)})
    before = parse(text, {"s": np.array([1.0, 2, 3]), "t": np.array([4.0, 5, 6])})
    first = before.graph[0]
    first.replace_input_with(1, before.graph.initializers["s"])  # of its readers, the graph's first came last
    after = before.clone()
    assert ShareWeights("p", plan)(after).modified
    assert [node.op_type for node in after.graph] == ["Concat", "Mul", "Add"]
    assert_same_values(before, after)

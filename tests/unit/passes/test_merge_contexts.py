"""One graph for many contexts: each computes what its own graph does, and what they share is there once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.passes.freeze import freeze
from cpcompile.passes.merge_contexts import CONTEXTS as NAMES
from cpcompile.passes.merge_contexts import merge_contexts
from cpcompile.passes.share_weights import ShareWeights, plan_runs
from tests.unit.passes.decoders import CONTEXTS, dynamic_graph, random_decoder, random_selection
from tests.unit.passes.graph_text import Array, inputs_of, parse, run, tensor

OUT_OF_RANGE = ort.capi.onnxruntime_pybind11_state.InvalidArgument


def merge(models: Mapping[str, ir.Model], feeds: Mapping[str, Array] | None = None, tolerance: float = 0.0) -> ir.Model:
    """The merged graph, checked: valid, every context gives what its own graph gives, others are refused."""
    feeds = feeds or inputs_of(next(iter(models.values())))
    before = {context: ir.to_proto(model).SerializeToString() for context, model in models.items()}
    merged = merge_contexts(models)
    assert {context: ir.to_proto(model).SerializeToString() for context, model in models.items()} == before
    onnx.checker.check_model(ir.to_proto(merged), full_check=True)
    assert json.loads(merged.metadata_props[NAMES]) == list(models)
    for number, model in enumerate(models.values()):
        expected, got = run(model, feeds), run(merged, {**feeds, "context": np.array(number)})
        assert list(got) == list(expected)
        for name, array in expected.items():
            assert got[name].shape == array.shape
            assert np.abs(got[name] - array).max(initial=0) <= tolerance * np.abs(array).max(initial=0)
    for unknown in (len(models), -1, -len(models), 10**6):
        with pytest.raises(OUT_OF_RANGE, match=r"context\.known.*out of data bounds"):
            run(merged, {**feeds, "context": np.array(unknown)})
    return merged


def operators(graph: ir.Graph) -> list[object]:
    """Operators in their order; an If as the list of its branches."""
    return [
        [operators(node.attributes[name].as_graph()) for name in ("then_branch", "else_branch")]
        if node.op_type == "If"
        else node.op_type
        for node in graph
    ]


CHOICE = ["Less", "Where", "Gather", "Less"]
"""What looks up the context and asks the first condition."""


def test_what_is_alike_before_and_after_is_computed_once() -> None:
    text = (
        "(float[N,4] x) => (float[N,4] y) { a = Relu(x) b = MatMul(a, w) c = Mul(b, g) d = Tanh(c) y = MatMul(d, h) }"
    )
    rng = np.random.default_rng(0)
    w, h = rng.standard_normal((4, 4)), rng.standard_normal((4, 4))
    models = {c: parse(text, {"w": w, "h": h, "g": rng.standard_normal(4)}) for c in ("de", "fr")}
    merged = merge(models)
    assert operators(merged.graph) == ["Relu", "MatMul", *CHOICE, [["Mul"], ["Mul"]], "Tanh", "MatMul"]
    own = {name for name in merged.graph.initializers if not name.startswith("context")}
    assert own == {"w", "h", "de/g", "fr/g"}
    assert np.array_equal(tensor(merged, "fr/g"), tensor(models["fr"], "g"))
    assert [value.name for value in merged.graph.inputs] == ["x", "context"]
    branches = [n for n in merged.graph.all_nodes() if n.op_type == "Mul"]
    assert [node.outputs[0].name for node in branches] == ["de/c", "fr/c"]


@pytest.mark.parametrize("contexts", [2, 3, 5, 8])
def test_contexts_are_the_leaves_of_a_balanced_tree(contexts: int) -> None:
    text = "(float[N,4] x) => (float[N,4] y) { m = Mul(x, g) y = Add(m, x) }"
    models = {f"c{i}": parse(text, {"g": np.full(4, i + 1.0)}) for i in range(contexts)}

    def depth(tree: object) -> int:
        return 1 + max(map(depth, tree)) if isinstance(tree, list) else 0

    merged = merge(models)
    *_, choice, add = operators(merged.graph)
    assert add == "Add"
    assert depth(choice) == 2 * int(np.ceil(np.log2(contexts)))  # an If is a list of branches, which are lists
    assert {f"c{i}/g" for i in range(contexts)} <= merged.graph.initializers.keys()


def test_a_tensor_that_some_contexts_share_is_there_once_for_them() -> None:
    text = "(float[N,4] x) => (float[N,4] y) { y = Mul(x, g) }"
    same, other = np.arange(4.0), np.ones(4)
    models = {c: parse(text, {"g": g}) for c, g in (("a", same), ("b", other), ("c", same.copy()))}
    assert {name for name in merge(models).graph.initializers if "g" in name} == {"a/g", "b/g"}


def test_branches_of_different_size() -> None:
    head = "(float[N,4] x) => (float[N,4] y)"
    models = {
        "long": parse(
            f"{head} {{ a = MatMul(x, w) b = Relu(a) c = MatMul(b, v) y = Add(x, c) }}", {"w": (4, 6), "v": (6, 4)}
        ),
        "short": parse(f"{head} {{ y = Relu(x) }}"),
        "none": parse(f"{head} {{ y = Identity(x) }}"),
    }
    merged = merge(models)
    assert {name for name in merged.graph.initializers if not name.startswith("context")} == {"w", "v"}


def test_several_outputs_and_values_that_pass_through() -> None:
    """Outputs that several nodes lead to, that are read further on, or made of weights alone."""
    head = "(float[N,4] x) => (float[N,4] y, float[N,4] z)"
    models = {
        "a": parse(f"{head} {{ h = Mul(x, g) y = Neg(h) z = Exp(h) }}", {"g": np.arange(4.0)}),
        "b": parse(f"{head} {{ h = Mul(x, g) y = Neg(h) z = Exp(h) }}", {"g": np.ones(4)}),
        "c": parse(f"{head} {{ y = Neg(x) z = Abs(y) }}"),
    }
    merge(models)
    constant = "(float[N,4] x) => (float[N,4] y, float[4] s) { y = Mul(x, g) s = Neg(g) }"
    merge({c: parse(constant, {"g": np.full(4, n)}) for n, c in ((1.0, "a"), (2.0, "b"))})


def test_graphs_that_are_equal_still_refuse_an_unknown_context() -> None:
    models = {c: parse("(float[N,4] x) => (float[N,4] y) { h = Exp(x) y = Relu(h) }") for c in "ab"}
    assert operators(merge(models).graph) == ["Exp", *CHOICE, [["Relu"], ["Relu"]]]


def test_sub_graphs_keep_what_they_read() -> None:
    text = """(float[N,4] x, bool c) => (float[N,4] y) {
        h = Mul(x, g)
        y = If (c) <
            then_branch = one () => (float[N,4] a) { m = MatMul(h, w) a = Add(m, x) },
            else_branch = two () => (float[N,4] b) { b = Mul(h, g) }
        >
    }"""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((4, 4))
    models = {c: parse(text, {"w": w, "g": rng.standard_normal(4)}) for c in ("p", "q", "r")}
    merged = merge(models)
    assert sum(name.endswith("w") for name in merged.graph.initializers) == 1
    names = [out.name for node in merged.graph.all_nodes() for out in node.outputs]
    assert len(set(names)) == len(names)


def test_random_numbers_are_drawn_in_every_context() -> None:
    text = "(float[N,4] x) => (float[N,4] y) { r = RandomUniformLike(x) h = Mul(r, g) f = Floor(h) y = Add(x, f) }"
    models = {c: parse(text, {"g": np.array([g])}, opset=20) for c, g in (("a", 0.5), ("b", 0.25))}
    *_, choice, floor, add = operators(merge(models).graph)
    assert (choice, floor, add) == ([["RandomUniformLike", "Mul"]] * 2, "Floor", "Add")


def test_tensors_at_one_place_of_a_file_are_not_read(tmp_path: Path) -> None:
    """The file does not even exist."""
    text = "(float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }"

    def stored(offset: int) -> ir.Model:
        model = parse(text, {"w": (4, 4)})
        model.graph.initializers["w"].const_value = ir.ExternalTensor(
            "weights.bin", offset, 64, ir.DataType.FLOAT, shape=ir.Shape([4, 4]), name="w", base_dir=tmp_path
        )
        return model

    merged = merge_contexts({"a": stored(64), "b": stored(64)})
    assert [name for name in merged.graph.initializers if not name.startswith("context")] == ["w"]
    with pytest.raises(FileNotFoundError):
        merge_contexts({"a": stored(0), "b": stored(64)})


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["(float[N,4] x) => (float[N,4] y) { y = Neg(x) }"] * 1, "give at least two"),
        (
            [
                "(float[N,4] x) => (float[N,4] y) { y = Neg(x) }",
                "(float[N,4] z) => (float[N,4] y) { y = Neg(z) }",
            ],
            "c1: has the inputs z FLOAT\\[N,4\\]; c0 has x FLOAT\\[N,4\\]",
        ),
        (
            [
                "(float[N,4] x) => (float[N,4] y) { y = Neg(x) }",
                "(float[N,4] x) => (float[N,4] z) { z = Neg(x) }",
            ],
            "c1: has the outputs z FLOAT; c0 has y FLOAT",
        ),
        (
            ["(float[N,4] x, int64 context) => (float[N,4] y) { y = Neg(x) }"] * 2,
            "c0: has an input 'context' already; freeze it first",
        ),
    ],
)
def test_graphs_that_cannot_be_merged_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises((UsageError, CpcompileError), match=message):
        merge_contexts({f"c{i}": parse(text) for i, text in enumerate(texts)})


def test_opsets_have_to_be_one() -> None:
    text = "(float[N,4] x) => (float[N,4] y) { y = Neg(x) }"
    with pytest.raises(CpcompileError, match="b: is in opset 20 of ONNX, a in 23"):
        merge_contexts({"a": parse(text), "b": parse(text, opset=20)})


@pytest.mark.parametrize(("opset", "kv_heads", "seed"), [pytest.param(20, 4, 1, marks=pytest.mark.slow), (23, 2, 2)])
def test_frozen_decoders_are_merged(opset: int, kv_heads: int, seed: int) -> None:
    model = random_decoder(kv_heads, seed)
    model.select(random_selection(model, seed))
    dynamic = dynamic_graph(model, opset)
    frozen = {context: freeze(dynamic, number).model for number, context in enumerate(CONTEXTS)}
    ids = np.random.default_rng(0).integers(0, 512, (2, 9))
    merged = merge(frozen, {"input_ids": ids}, 1e-6)
    assert np.array_equal(tensor(merged, "norm.weight"), tensor(dynamic, "norm.weight"))
    assert np.array_equal(tensor(merged, "embedding.weight"), tensor(dynamic, "embedding.weight").T)
    # The embedding is looked up, the positions are computed, and the logits made for all contexts at once.
    outside = [node.op_type for node in merged.graph]
    assert {"Cos", "Sin", "Transpose"} <= set(outside)
    assert outside[-1] == "MatMul"
    assert not any(v.name == "embedding.weight" for n in merged.graph if n.op_type == "If" for v in inner_inputs(n))


def inner_inputs(node: ir.Node) -> list[ir.Value]:
    """What the nodes in the branches of an If read."""
    branches = [attribute.as_graph() for attribute in node.attributes.values()]
    return [value for branch in branches for inner in branch.all_nodes() for value in inner.inputs if value is not None]


@pytest.mark.slow
def test_stored_runs_are_in_the_merged_graph_once_under_their_names() -> None:
    model = random_decoder(4, 5)
    ffn, heads = np.zeros((3, 2, 16), dtype=np.bool_), np.zeros((3, 2, 4), dtype=np.bool_)
    ffn[:, :, :4] = heads[:, :, 0] = True
    for context in range(3):
        ffn[context, :, 4 + 3 * context : 7 + 3 * context] = heads[context, :, 1 + context] = True
    selection = model.sort_units(Selection(CONTEXTS, {UnitKind.FFN: ffn, UnitKind.HEAD: heads}))
    model.select(selection)
    dynamic = dynamic_graph(model, 23)
    frozen = {context: freeze(dynamic, number) for number, context in enumerate(CONTEXTS)}
    parameters = [name for name, _ in model.named_parameters() if not name.endswith("_gate.table")]
    permutations = frozen["a"].permutations

    def whole(name: str) -> Array:
        array = tensor(dynamic, name)
        return array.transpose(permutations[name]) if name in permutations else array

    kept = {c: {name: own for name, own in f.kept.items() if name in parameters} for c, f in frozen.items()}
    plan = plan_runs(kept, {name: whole(name).shape for name in parameters})
    for context, one in frozen.items():
        assert ShareWeights(context, plan)(one.model).modified
    ids = np.array([[3, 1, 4]])
    merged = merge({context: one.model for context, one in frozen.items()}, {"input_ids": ids}, 1e-6)
    stored = {piece.stored_name: piece for runs in plan.values() for piece in runs}
    weights = {
        name
        for name, value in merged.graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT and value.shape is not None and value.shape.rank() == 2
    }
    assert weights <= stored.keys()
    assert {name for name in stored if "norm" not in name} == weights
    for name, piece in stored.items():
        assert np.array_equal(tensor(merged, name), piece.cut(whole(piece.name)))
    assert not any(branch.initializers for branch in merged.graph.subgraphs())


def test_strings_are_compared_by_what_they_hold() -> None:
    text = "(int64[N] x) => (string[N] y) { y = Gather(names, x) }"
    words = {"a": ["nul", "ein"], "b": ["nul", "ein"], "c": ["zero", "one"]}
    models = {name: parse(text, {"names": np.array(own, dtype=object)}) for name, own in words.items()}
    merged = merge_contexts(models)
    assert {name for name in merged.graph.initializers if "names" in name} == {"a/names", "c/names"}
    for number, own in enumerate(words.values()):
        assert run(merged, {"x": np.array([1, 0]), "context": np.array(number)})["y"].tolist() == own[::-1]


def test_what_cannot_be_merged_as_it_is_is_refused() -> None:
    text = "(float[N,2] x, float[2] w) => (float[N,2] y) { y = Add(x, w) }"
    models = {name: parse(text, {"w": (2,)}) for name in "ab"}
    with pytest.raises(CpcompileError, match="a: the input 'w' has a default"):
        merge_contexts(models)
    models = {name: parse("(float[N,2] x) => (float[N,2] y) { y = Relu(x) }", opset=8) for name in "ab"}
    with pytest.raises(CpcompileError, match="a: merging contexts needs opset 9 or later, .* is in opset 8; convert"):
        merge_contexts(models)

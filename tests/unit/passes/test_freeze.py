"""The whole way of one context, on captured decoders."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.core.errors import UsageError
from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels
from cpcompile.passes.freeze import Frozen, freeze, prepare

VARIANTS = [
    pytest.param(20, True, marks=pytest.mark.slow),
    (23, False),
    pytest.param(20, False, marks=pytest.mark.slow),
    pytest.param(23, True, marks=pytest.mark.slow),
]
TOLERANCE = 1e-5
"""Largest absolute difference of logits of magnitude 5; measured: 0 to 5e-7."""


def _expected_sizes(captured, context):
    """Elements per parameter, from the shape of a decoder and what the context keeps of it."""
    config = captured.config
    ffn, heads = captured.kept(context)
    width, per_key = config.width, config.heads // config.kv_heads
    sizes = {"embedding.weight": config.vocabulary * width, "norm.weight": width}
    for layer in range(config.layers):
        channels = int(ffn[layer].sum()) * config.align
        keys = int(heads[layer].sum()) * config.head_dim
        of_layer = {
            "attention_norm.weight": width if keys else 0,
            "attention.query.weight": keys * per_key * width,
            "attention.key.weight": keys * width,
            "attention.value.weight": keys * width,
            "attention.output.weight": keys * per_key * width,
            "ffn_norm.weight": width if channels else 0,
            "ffn.gate.weight": channels * width,
            "ffn.up.weight": channels * width,
            "ffn.down.weight": channels * width,
        }
        sizes |= {f"layers.{layer}.{name}": size for name, size in of_layer.items() if size}
    return sizes


@pytest.mark.parametrize(("opset", "grouped"), VARIANTS)
@pytest.mark.parametrize("context", range(4))
def test_parameters_are_exactly_those_that_the_context_keeps(captured, graphs, opset, grouped, context):
    dense = captured(opset, grouped)
    frozen = freeze(dense.model, context)
    parameters = {n: v for n, v in frozen.model.graph.initializers.items() if n in dense.model.graph.initializers}
    sizes = {n: int(np.prod(v.const_value.shape.numpy())) for n, v in parameters.items() if n != "frequencies"}
    assert sizes == _expected_sizes(dense, context)
    new = {n: s for n, s in graphs.shapes(frozen.model).items() if n not in dense.model.graph.initializers}
    assert all(np.count_nonzero(np.array(shape) > 1) <= 1 for shape in new.values()), "a parameter under a new name"
    assert frozen.blocked == ()
    assert [value.name for value in frozen.model.graph.inputs] == ["input_ids"]
    assert [value.name for value in frozen.model.graph.outputs] == ["logits"]
    graphs.check(frozen.model)


@pytest.mark.parametrize(("opset", "grouped"), VARIANTS)
def test_logits_are_those_of_the_dynamic_graph(captured, graphs, opset, grouped):
    dense = captured(opset, grouped)
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, dense.config.vocabulary, shape) for shape in ((1, 1), (2, 7), (3, 16))]
    seen = []
    for context in range(4):
        frozen = freeze(dense.model, context)
        for ids in inputs:
            expected = graphs.run(dense.model, {"input_ids": ids, "context": np.array(context)})["logits"]
            got = graphs.run(frozen.model, {"input_ids": ids})["logits"]
            assert got.shape == expected.shape
            assert np.abs(got - expected).max() <= TOLERANCE
        seen.append(got)
    differences = [np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]]
    assert min(differences) > 0.1, "contexts that compute the same would make this test blind"


@pytest.mark.parametrize(("opset", "grouped"), VARIANTS)
def test_kept_and_permutations_tell_where_every_stored_number_comes_from(captured, opset, grouped):
    dense = captured(opset, grouped)
    for context in range(3):
        frozen = freeze(dense.model, context)
        for name, value in frozen.model.graph.initializers.items():
            if name not in dense.model.graph.initializers:
                assert name not in frozen.permutations
                continue
            array = dense.model.graph.initializers[name].const_value.numpy()
            array = array.transpose(frozen.permutations.get(name, range(array.ndim)))
            for axis, channels in enumerate(frozen.kept[name]):
                array = array if channels is None else array.take(channels, axis=axis)
            np.testing.assert_array_equal(value.const_value.numpy(), array, err_msg=name)
            assert tuple(value.shape) == array.shape
        assert frozen.kept.keys() <= set(frozen.model.graph.initializers)


@pytest.mark.parametrize(("opset", "grouped"), VARIANTS)
def test_a_second_elimination_finds_nothing(captured, opset, grouped):
    again = EliminateDeadChannels()(freeze(captured(opset, grouped).model, 0).model)
    assert not again.modified
    assert all(axes == (None,) * len(axes) for axes in again.kept.values())


@pytest.mark.parametrize("opset", [pytest.param(20, marks=pytest.mark.slow), 23])
def test_freezing_is_deterministic_and_leaves_the_dynamic_graph_alone(captured, opset):
    dynamic = captured(opset, True).model
    before = ir.to_proto(dynamic).SerializeToString()
    first, second = (ir.to_proto(freeze(dynamic, 0).model).SerializeToString() for _ in range(2))
    assert first == second
    assert ir.to_proto(dynamic).SerializeToString() == before


def _described(frozen: Frozen) -> tuple[object, ...]:
    """All but the names of nodes, in which other nodes are counted, and the order of initializers."""
    graph = frozen.model.graph
    nodes = []
    for node in graph:
        made = [(out.name, out.dtype, str(out.shape)) for out in node.outputs]
        read = [value and value.name for value in node.inputs]
        nodes.append((node.op_type, dict(node.attributes), node.metadata_props, read, made))
    arrays = {n: (v.const_value.dtype, v.const_value.numpy().tolist()) for n, v in graph.initializers.items()}
    kept = {n: [None if a is None else a.tolist() for a in axes] for n, axes in frozen.kept.items()}
    return nodes, arrays, kept, frozen.permutations, frozen.blocked, graph.opset_imports


@pytest.mark.parametrize(("opset", "grouped"), VARIANTS)
def test_a_prepared_graph_freezes_to_the_same(captured, opset, grouped):
    dynamic = captured(opset, grouped).model
    before = ir.to_proto(dynamic).SerializeToString()
    prepared = prepare(dynamic)
    assert len(prepared.model.graph) < 0.7 * len(dynamic.graph)
    for context in range(4):
        assert _described(freeze(prepared, context)) == _described(freeze(dynamic, context))
    assert ir.to_proto(dynamic).SerializeToString() == before


def test_tensors_are_shared_or_lazy_never_copied(captured):
    dynamic = captured(23, True).model
    frozen = freeze(dynamic, 0).model
    whole, cut = "norm.weight", "layers.0.ffn.up.weight"
    assert frozen.graph.initializers[whole].const_value is dynamic.graph.initializers[whole].const_value
    assert isinstance(frozen.graph.initializers[cut].const_value, ir.LazyTensor)


def test_sublayers_in_which_nothing_is_left_disappear(captured, graphs):
    dense = captured(23, True)
    nothing = freeze(dense.model, CONTEXT_NOTHING).model
    assert graphs.operators(nothing) == ["Gather", "Transpose", "RMSNormalization", "MatMul"]
    no_heads = graphs.operators(freeze(dense.model, 2).model)
    assert no_heads.count("Attention") == dense.config.layers - 1


CONTEXT_NOTHING = 3


def test_a_context_that_does_not_exist_is_refused(captured):
    with pytest.raises(UsageError, match="context 4: .*table has the contexts 0 to 3"):
        freeze(captured(23, True).model, 4)

"""Contexts frozen out of nano decoders: exactly what the selection keeps, the same logits, and planted faults."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from cpcompile.core.errors import CpcompileError
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.models.decoder import Decoder
from cpcompile.passes.freeze import Frozen, freeze
from cpcompile.passes.strip_metadata import StripMetadata
from cpcompile.pipeline.accounting import Accounting, account
from tests.unit.passes.decoders import CONTEXTS, FORMS, dynamic_graph, random_decoder, random_selection
from tests.unit.passes.graph_text import run, tensor


def sizes(model: ir.Model) -> dict[str, int]:
    return {n: int(np.prod(v.const_value.shape.numpy())) for n, v in model.graph.initializers.items() if v.const_value}


def proto_of(model: ir.Model) -> onnx.ModelProto:
    """Everything but the names of the tensors in Constant nodes: a shared tensor is given one when it is lifted."""
    proto = ir.to_proto(model)
    for node in proto.graph.node:
        for attribute in node.attribute:
            attribute.t.ClearField("name")
    return proto


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("opset", "kv_heads"), FORMS)
def test_a_context_keeps_what_its_selection_says_and_its_logits(opset: int, kv_heads: int, seed: int) -> None:
    model = random_decoder(kv_heads, seed)
    selection = random_selection(model, seed)
    model.select(selection)
    dynamic = dynamic_graph(model, opset)
    untouched = proto_of(dynamic)
    for index, context in enumerate(CONTEXTS):
        frozen = freeze(dynamic, index)
        onnx.checker.check_model(ir.to_proto(frozen.model), full_check=True)
        assert frozen.blocked == ()
        expected, got = model.kept_sizes(selection, context), sizes(frozen.model)
        assert {name: got.get(name, 0) for name in expected} == expected
        assert {node.inputs[0].name for node in frozen.model.graph if node.op_type == "Shape"} <= {"input_ids"}
        parameters = [name for name in expected if got.get(name)]
        assert frozen.kept.keys() >= set(parameters)
        for name in parameters:
            whole = tensor(dynamic, name)
            whole = whole.transpose(frozen.permutations.get(name, tuple(range(whole.ndim))))
            for axis, indices in enumerate(frozen.kept[name]):
                whole = whole if indices is None else whole.take(indices, axis=axis)
            assert np.array_equal(tensor(frozen.model, name), whole)
        for shape in ((1, 1), (2, 7)):
            ids = np.random.default_rng(seed).integers(0, 512, shape)
            before = run(dynamic, {"input_ids": ids, "context": np.array(index)})["logits"]
            after = run(frozen.model, {"input_ids": ids})["logits"]
            assert after.shape == before.shape == (*shape, 512)
            assert np.abs(before).max() > 1
            assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    assert proto_of(dynamic) == untouched


def test_a_sub_layer_with_nothing_left_is_gone_with_its_norm() -> None:
    model = random_decoder(2, 3)
    nothing = {u.kind: np.zeros((3, u.layers, u.count), dtype=np.bool_) for u in model.units()}
    selection = Selection(CONTEXTS, nothing)
    model.select(selection)
    for opset in (20, 23):
        frozen = freeze(dynamic_graph(model, opset), 0)
        assert {n for n, size in sizes(frozen.model).items() if size >= 64} == {"embedding.weight", "norm.weight"}
        assert not any(name.startswith("layers.") for name in frozen.model.graph.initializers)
        ids = torch.arange(12).reshape(2, 6)
        with torch.no_grad():
            expected = model(ids, torch.tensor(0)).numpy()
        got = run(frozen.model, {"input_ids": ids.numpy()})["logits"]
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_nothing_of_the_exporter_is_left_but_module_paths() -> None:
    frozen = freeze(dynamic_graph(random_decoder(2, 0), 23), 0)
    assert {key for node in frozen.model.graph for key in node.metadata_props} == {"namespace"}
    paths = {node.metadata_props.get("namespace", "") for node in frozen.model.graph}
    assert {"layers.0.ffn", "layers.1.attention"} <= paths
    assert not any(set(path) & set(":/") for path in paths)
    assert not StripMetadata()(frozen.model).modified


def _rename(frozen: Frozen, model: Decoder) -> None:
    value = frozen.model.graph.initializers.pop("layers.0.ffn.up.weight")
    value.name = "layers.0.ffn.up.weight_1"
    frozen.model.graph.register_initializer(value)


def _cut_one_more(frozen: Frozen, model: Decoder) -> None:
    value = frozen.model.graph.initializers["layers.1.ffn.down.weight"]
    value.const_value = ir.tensor(tensor(frozen.model, "layers.1.ffn.down.weight")[1:])


def _lose(frozen: Frozen, model: Decoder) -> None:
    del frozen.model.graph.initializers["layers.1.attention.key.weight"]


def _keep_too_much(frozen: Frozen, model: Decoder) -> None:
    value = frozen.model.graph.initializers["layers.0.attention.query.weight"]
    value.const_value = ir.tensor(model.blocks[0].attention.query.weight.detach().numpy().copy())


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (None, None),
        (_rename, ["layers.0.ffn.up.weight: 0 of", "layers.0.ffn.up.weight_1: 5,120 elements that belong to no"]),
        (
            _cut_one_more,
            ["layers.1.ffn.down.weight: 3,008 of 16,384 elements are in the graph, the selection keeps 3,072"],
        ),
        (_lose, ["layers.1.attention.key.weight: 0 of"]),
        (_keep_too_much, ["layers.0.attention.query.weight: 4,096 of 4,096 elements are in the graph, the selection"]),
    ],
)
def test_planted_faults_stop_the_build(
    fault: Callable[[Frozen, Decoder], None] | None, named: list[str] | None
) -> None:
    model = random_decoder(4, 5)
    ffn, heads = np.zeros((3, 2, 16), dtype=np.bool_), np.zeros((3, 2, 4), dtype=np.bool_)
    ffn[:, 0, :5] = ffn[:, 1, 4:7] = heads[:, :, 1:3] = True
    selection = Selection(CONTEXTS, {UnitKind.FFN: ffn, UnitKind.HEAD: heads})
    model.select(selection)
    frozen = freeze(dynamic_graph(model, 23), 0)
    total = {n: p.numel() for n, p in model.named_parameters() if not n.endswith("_gate.table")}
    kinds = {name: str(kind) for name in total if (kind := model.parameter_kind(name)) is not None}

    def accounted() -> Accounting:
        kept = model.kept_sizes(selection, "a")
        return account("a", frozen.model.graph, total=total, expected=kept, kinds=kinds, used=lambda: total)

    if fault is None:
        result = accounted()
        assert result.kept + result.removed == result.total == sum(total.values())
        assert result.removed_by_kind == {"ffn": (2 * 16 - 8) * 16 * 64 * 3, "head": 2 * 2 * 16 * 64 * 4}
        return
    assert named is not None
    fault(frozen, model)
    with pytest.raises(CpcompileError, match="a: parameters do not add up after freezing") as raised:
        accounted()
    for text in named:
        assert text in str(raised.value)

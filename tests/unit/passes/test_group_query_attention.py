"""Attention over the cache in the operator of ONNX Runtime: the same values, in one buffer or in two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cpcompile.core.cache import IN_PLACE, INPUT, KEEP, MASK, OUTPUT, PAST, POSITIONS, present_of
from cpcompile.core.selection import UnitKind
from cpcompile.core.types import Array
from cpcompile.passes.cache_interface import input_shapes
from cpcompile.passes.freeze import freeze
from cpcompile.passes.group_query_attention import GroupQueryAttention
from cpcompile.pipeline.cpu_engines import fused_for_cpu
from tests.unit.passes.decoders import CONTEXTS, dynamic_graph, random_decoder, random_selection
from tests.unit.passes.graph_text import check
from tests.unit.passes.test_caches import assert_close, eager, opened, step

ROOM = 20


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def in_one_buffer(session: ort.InferenceSession, feeds: Mapping[str, Array], buffers: dict[str, Array]) -> Array:
    """The logits; new tokens are written into `buffers`, which have room for them."""
    binding = session.io_binding()
    for name, array in {**feeds, KEEP: np.array(0)}.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output(OUTPUT)
    for name, buffer in buffers.items():
        value = ort.OrtValue.ortvalue_from_numpy(buffer)
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(present_of(name), value)
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0].numpy()


@pytest.mark.parametrize("kv_heads", [2, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 4))])
def test_a_decoder_computes_the_same(kv_heads: int) -> None:
    model = random_decoder(kv_heads, 1)
    selection = random_selection(model, 3)
    model.select(selection)
    dynamic = dynamic_graph(model, 23, cached=True)
    ids = np.random.default_rng(0).integers(0, 512, (2, 9))
    with_heads = [index for index in range(len(CONTEXTS)) if selection.kept[UnitKind.HEAD][index].any()]
    assert len(with_heads) > 1
    for index in with_heads:
        frozen = freeze(dynamic, index).model
        faster = fused_for_cpu(frozen)
        check(faster)
        assert input_shapes(faster.graph) == input_shapes(frozen.graph)
        assert [v.shape for v in faster.graph.outputs] == [v.shape for v in frozen.graph.outputs]
        layers = operators(frozen)["Attention"]
        assert operators(faster)["GroupQueryAttention"] == layers and IN_PLACE in faster.metadata_props
        assert operators(faster)["RotaryEmbedding"] == 2 * layers and "Attention" not in operators(faster)
        assert not GroupQueryAttention()(faster).modified
        session, expected = opened(faster), eager(model, ids, index)
        logits, cache = step(session, {INPUT: ids[:, :4]})
        assert_close(logits, expected[:, :4])
        logits, cache = step(session, {INPUT: ids[:, 4:5], **cache})
        assert_close(logits, expected[:, 4:5])
        first = {name: array[:1] for name, array in cache.items()}
        assert_close(step(session, {INPUT: ids[:1, 5:], **first, KEEP: np.array(2)})[0], expected[:1, -2:])


def test_the_cache_may_be_one_buffer_with_prompts_of_different_lengths() -> None:
    model = random_decoder(2, 3)
    frozen = freeze(dynamic_graph(model, 23, cached=True), 0).model
    session = opened(fused_for_cpu(frozen))
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 512, length + 3) for length in (7, 3, 5)]
    mask = np.array([[0] * (10 - len(each)) + [1] * (len(each) - 3) for each in texts])
    ids = np.stack([np.concatenate([np.zeros(10 - len(each), np.int64), each]) for each in texts])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    buffers = {
        name: np.full((3, shape[1], ROOM, shape[3]), np.nan, dtype=np.float32)
        for name, shape in input_shapes(frozen.graph).items()
        if PAST.fullmatch(name)
    }
    logits = [in_one_buffer(session, {INPUT: ids[:, :7], MASK: mask, POSITIONS: positions}, buffers)]
    for index in range(7, 10):
        mask = np.c_[mask, [1, 1, 1]]
        positions = positions[:, -1:] + 1
        logits.append(
            in_one_buffer(session, {INPUT: ids[:, index : index + 1], MASK: mask, POSITIONS: positions}, buffers)
        )
    for row, text in enumerate(texts):
        assert_close(np.concatenate(logits, axis=1)[row : row + 1, -len(text) :], eager(model, text[None], 0))
    for buffer in buffers.values():
        assert np.isfinite(buffer[:, :, :10]).all() and np.isnan(buffer[:, :, 10:]).all()


def one(model: ir.Model, operator: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == operator)


def look_ahead(model: ir.Model) -> None:
    one(model, "Less").op_type = "Greater"


def look_everywhere(model: ir.Model) -> None:
    one(model, "And").op_type = "Or"


def count_from_one(model: ir.Model) -> None:
    start = one(model, "Range").inputs[0]
    assert start is not None
    start.const_value = ir.tensor(np.array(1), name=start.name)


def cap_logits(model: ir.Model) -> None:
    one(model, "Attention").attributes["softcap"] = ir.AttrFloat32("softcap", 2.0)


def causal_twice(model: ir.Model) -> None:
    one(model, "Attention").attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def keys_as_values(model: ir.Model) -> None:
    node = one(model, "Attention")
    node.replace_input_with(2, node.inputs[1])


def forget_shapes(model: ir.Model) -> None:
    for node in model.graph:
        for out in node.outputs:
            out.shape = None


@pytest.mark.parametrize(
    "change",
    [look_ahead, look_everywhere, count_from_one, cap_logits, causal_twice, keys_as_values, forget_shapes],
)
def test_what_computes_something_else_stays(change: Callable[[ir.Model], None]) -> None:
    model = freeze(dynamic_graph(random_decoder(2, 1), 23, cached=True), 0).model
    assert GroupQueryAttention()(model.clone()).modified
    change(model)
    before = operators(model)
    assert not GroupQueryAttention()(model).modified
    assert operators(model) == before and IN_PLACE not in model.metadata_props


def test_heads_that_the_kernel_refuses_stay() -> None:
    """Of 4 channels; it takes multiples of 8."""
    model = freeze(dynamic_graph(random_decoder(2, 1), 23, cached=True), 0).model
    for node in model.graph:
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.shape is not None and value.shape[-1:] == (16,):
                value.shape = ir.Shape([*value.shape[:-1], 4])
    channels = one(model, "Attention").inputs[0]
    assert channels is not None and channels.shape is not None and channels.shape[-1] == 4
    assert not GroupQueryAttention()(model).modified


def test_graphs_without_a_cache_stay() -> None:
    model = freeze(dynamic_graph(random_decoder(2, 1), 23), 0).model
    assert not GroupQueryAttention()(model).modified

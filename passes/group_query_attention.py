"""Let ONNX Runtime write keys and values into the cache where it lies, in place of joining it anew for every token.

present = Concat(past, new);  Attention(query, present, …, mask)  ->  GroupQueryAttention(query, new, …, past, …)

The interface stays: past and present may be two buffers, as before, or one with room for the tokens to come. As many of
its tokens are read as `attention_mask` has. The operator only looks back, so the mask has to; it becomes a bias.
Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cpcompile.core.cache import IN_PLACE, MASK
from cpcompile.passes.cache_interface import caches
from cpcompile.passes.causal_masks import looks_back
from cpcompile.passes.clean_up import CleanUp, replace_value
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import add_constant, int_attribute, known_shape, made_by, permutation

DOMAIN = "com.microsoft"
SWAPPED = [0, 2, 1, 3]
"""(batch, heads, tokens, channels) <-> (batch, tokens, heads, channels)"""
ALIGNMENT = 8
"""The channels of a head are a multiple of it, or the kernel refuses them."""
NONE = np.float32(np.finfo(np.float32).min)
"""The bias of a token that is not looked at; infinity would give rows that are no numbers."""


@dataclass(frozen=True)
class _Layer:
    """Attention over Concat(past, new) of keys and of values."""

    attention: ir.Node
    news: tuple[ir.Value, ...]
    pasts: tuple[ir.Value, ...]
    mask: ir.Value


@dataclass(frozen=True)
class GroupQueryAttention(GraphPass):
    """Replace Attention over a cache by the operator of ONNX Runtime, in all layers or in none."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; its metadata then say that its cache may be one buffer."""
        graph, known = model.graph, caches(model.graph)
        layers = [layer for node in graph if (layer := _layer(graph, node, known)) is not None]
        if not layers or {past for layer in layers for past in layer.pasts} != set(known):
            return ir.passes.PassResult(model, False)
        lengths = _lengths(graph)
        biases = {mask: _bias(graph, mask) for mask in {layer.mask: None for layer in layers}}
        for layer in layers:
            _replace(graph, layer, known, (*lengths, None, None, None, biases[layer.mask]))
        graph.opset_imports[DOMAIN] = 1
        model.metadata_props[IN_PLACE] = "true"
        CleanUp(frozenset(graph.initializers))(model)
        return ir.passes.PassResult(model, True)


def _layer(graph: ir.Graph, node: ir.Node, known: Mapping[ir.Value, ir.Value]) -> _Layer | None:
    """The layer of `node`, if the operator computes the same."""
    if made_by(node.outputs[0], "Attention") is None or len(node.inputs) != 4:
        return None
    query, keys, values, mask = node.inputs
    joined = [each for value in (keys, values) if (each := _joined(value, node, known)) is not None]
    if query is None or mask is None or len(joined) != 2 or not _is_plain(node) or query.dtype != ir.DataType.FLOAT:
        return None
    pasts, news = zip(*joined, strict=True)
    shape = known_shape(query)
    lengths = {value.name: known_shape(value) for value in graph.inputs}.get(MASK, ())
    if len(shape) != 4 or len(lengths) != 2 or not looks_back(mask, shape[2], lengths[1]):
        return None
    (batch, heads, sequence, channels), (_, total) = shape, lengths
    kv_heads = next(iter(known_shape(news[0])[1:]), None)
    fits = (
        lengths == (batch, total)
        and all(known_shape(new) == (batch, kv_heads, sequence, channels) for new in news)
        and known_shape(known[pasts[0]])[2:3] == (total,)
        and known_shape(mask) == (batch, 1, sequence, total)
        and isinstance(channels, int)
        and channels % ALIGNMENT == 0
        and isinstance(heads, int)
        and isinstance(kv_heads, int)
        and heads % kv_heads == 0
    )
    return _Layer(node, news, pasts, mask) if fits else None


def _is_plain(attention: ir.Node) -> bool:
    """Whether it neither caps its logits, nor gives them, nor has a mask of its own."""
    softcap = attention.attributes.get("softcap")
    own = [int_attribute(attention, name, 0) for name in ("is_causal", "qk_matmul_output_mode")]
    return not any(own) and not any(out.uses() for out in attention.outputs[1:]) and (not softcap or not softcap.value)


def _joined(
    present: ir.Value | None, reader: ir.Node, known: Mapping[ir.Value, ir.Value]
) -> tuple[ir.Value, ir.Value] | None:
    """past and new, if only `reader` reads `present` = Concat(past, new), and nothing else reads the past."""
    concat = made_by(present, "Concat")
    if present is None or concat is None or len(concat.inputs) != 2 or int_attribute(concat, "axis", 0) not in (2, -2):
        return None
    past, new = concat.inputs
    if past is None or new is None or known.get(past) is not present:
        return None
    alone = {node for node, _ in past.uses()} == {concat} and [node for node, _ in present.uses()] == [reader]
    return (past, new) if alone else None


def _lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """The index of the last token of each text, and the number of tokens with those in the cache; all int32."""
    (mask,) = (value for value in graph.inputs if value.name == MASK)
    one = add_constant(graph, "cache.one", np.array([1], dtype=np.int32))
    batch = ir.node("Shape", [mask], {"start": 0, "end": 1})
    tokens = ir.node("Shape", [mask], {"start": 1, "end": 2})
    number = ir.node("Cast", [tokens.outputs[0]], {"to": ir.DataType.INT32})
    last = ir.node("Sub", [number.outputs[0], one])
    lasts = ir.node("Expand", [last.outputs[0], batch.outputs[0]])
    total = ir.node("Squeeze", [number.outputs[0]])
    nodes = {"batch": batch, "tokens": tokens, "number": number, "last": last, "lasts": lasts, "total": total}
    for name, node in nodes.items():
        node.name = node.outputs[0].name = f"cache.{name}"
    graph.insert_before(graph[0], nodes.values())
    return lasts.outputs[0], total.outputs[0]


def _bias(graph: ir.Graph, mask: ir.Value) -> ir.Value:
    """0 where `mask` is true, and otherwise so low that nothing is left of it."""
    name = f"{mask.name}.bias"
    looked, overlooked = (
        add_constant(graph, f"{name}.{which}", np.array(number, dtype=np.float32))
        for which, number in (("seen", 0), ("unseen", NONE))
    )
    node = ir.node("Where", [mask, looked, overlooked], name=name)
    producer, (out,) = mask.producer(), node.outputs
    assert producer is not None  # a mask that looks back is computed
    graph.insert_after(producer, node)
    out.name, out.type, out.shape = name, ir.TensorType(ir.DataType.FLOAT), mask.shape
    return out


def _replace(
    graph: ir.Graph, layer: _Layer, known: Mapping[ir.Value, ir.Value], rest: tuple[ir.Value | None, ...]
) -> None:
    old = layer.attention
    query, out = old.inputs[0], old.outputs[0]
    assert query is not None
    _, heads, _, channels = known_shape(query)
    _, kv_heads, *_ = known_shape(layer.news[0])
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    attributes = {"num_heads": ir.AttrInt64("num_heads", heads), "kv_num_heads": ir.AttrInt64("kv_num_heads", kv_heads)}
    attributes |= {name: each for name, each in old.attributes.items() if name == "scale"}
    tokens = [_tokens_first(graph, old, value) for value in (query, *layer.news)]
    new = ir.node(
        "GroupQueryAttention", [*tokens, *layer.pasts, *rest], attributes, domain=DOMAIN, num_outputs=3, name=old.name
    )
    new.metadata_props.update(old.metadata_props)
    graph.insert_before(old, new)
    for value, part in zip(new.outputs, ("mixed", "keys", "values"), strict=True):
        value.name, value.type = f"{out.name}.{part}", out.type
    for past, present in zip(layer.pasts, new.outputs[1:], strict=True):
        replace_value(present, known[past])
    mixed, shape = new.outputs[0], known_shape(tokens[0])
    mixed.shape = ir.Shape(shape)
    if (joined := _joined_heads(out, shape)) is not None:
        mixed.name, joined.name = joined.name, f"{joined.name}.old"
        ir.convenience.replace_all_uses_with(joined, mixed)
        return
    batch, sequence, _ = shape
    sizes = add_constant(graph, f"{out.name}.sizes", np.array([0, 0, heads, channels]))
    apart = (batch, sequence, heads, channels)
    split = _insert(graph, old, ir.node("Reshape", [mixed, sizes]), f"{out.name}.split", out, apart)
    swap = ir.node("Transpose", [split], {"perm": SWAPPED})
    replace_value(_insert(graph, old, swap, f"{out.name}.swapped", out, known_shape(out)), out)


def _joined_heads(mixed: ir.Value, shape: tuple[int | ir.SymbolicDim, ...]) -> ir.Value | None:
    """The value of `shape` (batch, sequence, heads x channels) that `mixed`, heads first, only becomes."""
    value = mixed
    for operator in ("Transpose", "Reshape"):
        readers = [] if value.is_graph_output() else list(value.consumers())
        if len(readers) != 1 or made_by(value := readers[0].outputs[0], operator) is None:
            return None
        if operator == "Transpose" and permutation(readers[0], 4) != SWAPPED:
            return None
    return value if known_shape(value) == shape and not value.is_graph_output() else None


def _tokens_first(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    """`value` (batch, heads, sequence, channels) as (batch, sequence, heads x channels), computed where it was."""
    batch, heads, sequence, channels = known_shape(value)
    assert isinstance(heads, int) and isinstance(channels, int)
    flat = (batch, sequence, heads * channels)
    rotary, transpose = made_by(value, "RotaryEmbedding"), made_by(value, "Transpose")
    if rotary is not None and (rotated := rotary.inputs[0]) is not None:
        inputs = [_tokens_first(graph, before, rotated), *rotary.inputs[1:]]
        attributes = {**rotary.attributes, "num_heads": ir.AttrInt64("num_heads", heads)}
        node = ir.node("RotaryEmbedding", inputs, attributes, name=rotary.name)
        node.metadata_props.update(rotary.metadata_props)
        return _insert(graph, before, node, f"{value.name}.tokens", value, flat)
    if transpose is not None and permutation(transpose, 4) == SWAPPED and transpose.inputs[0] is not None:
        swapped = transpose.inputs[0]
    else:
        node, shape = ir.node("Transpose", [value], {"perm": SWAPPED}), (batch, sequence, heads, channels)
        swapped = _insert(graph, before, node, f"{value.name}.swapped", value, shape)
    reshape = made_by(swapped, "Reshape")
    if reshape is not None and (source := reshape.inputs[0]) is not None and known_shape(source) == flat:
        return source
    sizes = add_constant(graph, f"{value.name}.sizes", np.array([0, 0, heads * channels]))
    return _insert(graph, before, ir.node("Reshape", [swapped, sizes]), f"{value.name}.tokens", value, flat)


def _insert(
    graph: ir.Graph, before: ir.Node, node: ir.Node, name: str, like: ir.Value, shape: tuple[int | ir.SymbolicDim, ...]
) -> ir.Value:
    """Insert `node`; its result of the type of `like`, named and shaped."""
    graph.insert_before(before, node)
    (out,) = node.outputs
    out.name, out.type, out.shape = name, like.type, ir.Shape(shape)
    return out

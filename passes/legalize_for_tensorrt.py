"""Rewrite what TensorRT's parser or builder refuses, or report it with node, torch module, reason and remedy.

    present = Concat(past, new)    Attention(q, k, v, mask, past_k, past_v) -> y, present_k, present_v
                                   becomes two Concats and Attention(q, present_k, present_v, mask) -> y

All rules are in `RULES`, one per operator, tested with TensorRT-RTX 1.7. Everything else is left to the library, such
as attention in float32, which the exporter lets it decompose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from cpcompile.core.errors import CpcompileError
from cpcompile.files.onnx_file import module_of
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import constant_of, int_attribute, subgraphs_of

SPELL_OUT = "build with --opset 20, which spells attention out"
REPLACE = "replace it in the model"
FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT4E2M1", "FLOAT8E8M0")
TYPES = frozenset((*FLOATS, "INT64", "INT32", "INT8", "UINT8", "INT4", "BOOL"))
"""The types of tensors that TensorRT supports."""
SHOWN = 3
"""The number of refusals that one error lists."""
MASK, PAST_KEY, PAST_VALUE = 3, 4, 5


@dataclass(frozen=True)
class Refusal:
    """Why a node cannot stay, and what to do."""

    reason: str
    way_out: str


Rule = Callable[[ir.Node], "Refusal | int"]
"""The number of edits that make a node legal, 0 if it is; or why it cannot be."""


@dataclass(frozen=True)
class LegalizeForTensorRT(GraphPass):
    """Rewrite what TensorRT refuses; an error names what cannot be rewritten."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` counts rewritten nodes. CpcompileError lists the nodes that have to go."""
        refused, edits = [], 0
        for value in model.graph.inputs:
            if refusal := _refused_type(value):
                refused.append(f"the input {value.name}: {refusal.reason}; {refusal.way_out}")
        for graph in model.graphs():
            for node in list(graph):
                found = _judge(node)
                if isinstance(found, int):
                    edits += found
                else:
                    refused.append(f"{_described(node)}: {found.reason}; {found.way_out}")
        if refused:
            more = f" (and {len(refused) - SHOWN} more)" if len(refused) > SHOWN else ""
            raise CpcompileError(f"TensorRT cannot build this graph: {'. '.join(refused[:SHOWN])}{more}")
        return ir.passes.PassResult(model, modified=edits > 0)


def _judge(node: ir.Node) -> Refusal | int:
    """Apply the rule of the operator, then the check of types that holds for all."""
    rule = RULES.get(node.op_type)
    found = rule(node) if rule is not None else 0
    if isinstance(found, Refusal) or found:
        return found
    return next((refusal for out in node.outputs if (refusal := _refused_type(out))), 0)


def _attention(node: ir.Node) -> Refusal | int:
    """Attention has one output, no cache and the usual softmax; caches are concatenated in front of it."""
    keys, values = node.inputs[1:3]
    past = [_input(node, PAST_KEY), _input(node, PAST_VALUE)]
    present = [out if out is not None and _is_read(out) else None for out in (_output(node, 1), _output(node, 2))]
    if (scores := _output(node, 3)) is not None and _is_read(scores):
        return Refusal("Attention cannot give its scores", SPELL_OUT)
    if "softcap" in node.attributes and node.attributes["softcap"].as_float() != 0:
        return Refusal("Attention with softcap is not supported", SPELL_OUT)
    if (chosen := int_attribute(node, "softmax_precision", 0)) and (keys is None or chosen != keys.dtype):
        return Refusal("the precision of Attention's softmax cannot be chosen", SPELL_OUT)
    causal = bool(int_attribute(node, "is_causal", 0))
    if _input(node, MASK) is not None and causal:
        return Refusal("Attention takes a mask or is causal, not both", SPELL_OUT)
    if len(node.inputs) > PAST_VALUE + 1:
        return Refusal("Attention does not take the lengths of its keys", SPELL_OUT)
    edits = int(node.attributes.pop("softmax_precision", None) is not None)
    if any(value is not None for value in (*past, *present)):
        if keys is None or keys.shape is None or keys.shape.rank() != 4:
            return Refusal("the cache of an Attention whose heads are not an axis of their own", SPELL_OUT)
        if past[0] is not None and causal:
            # Causal counts from the first key: with keys of the past in front, other keys would be masked.
            return Refusal("causal Attention with a cache", SPELL_OUT)
        for index, (own, old, out) in enumerate(zip((keys, values), past, present, strict=True), start=1):
            _join(node, index, own, old, out)
        edits += 1
    if edits or len(node.outputs) > 1:
        node.resize_inputs(MASK if _input(node, MASK) is None else PAST_KEY)
        edits += len(node.outputs) > 1
        node.resize_outputs(1)
    return edits


def _join(node: ir.Node, index: int, own: ir.Value | None, old: ir.Value | None, out: ir.Value | None) -> None:
    """Concatenate the past and the new keys (or values); the result replaces the present ones that the node gave."""
    assert own is not None and isinstance(node.graph, ir.Graph)
    props = dict(node.metadata_props)
    if old is not None:
        joined = ir.Node("", "Concat", [old, own], [ir.AttrInt64("axis", 2)], metadata_props=props)
    elif out is not None:
        joined = ir.Node("", "Identity", [own], metadata_props=props)
    else:
        return
    joined.name = f"{node.name}.{'keys' if index == 1 else 'values'}"
    value = joined.outputs[0]
    value.type, value.name = own.type, joined.name
    node.graph.insert_before(node, joined)
    node.replace_input_with(index, value)
    if out is not None:
        value.shape, name = out.shape, out.name
        ir.convenience.replace_all_uses_with(out, value, replace_graph_outputs=True)
        out.name, value.name = f"{name}.replaced", name


def _rotary(node: ir.Node) -> Refusal | int:
    """Repeat tables that are given once for the whole batch for every sequence."""
    source, position_ids = node.inputs[0], _input(node, 3)
    tables = [value for value in node.inputs[1:3] if value is not None]
    if position_ids is not None or source is None or source.shape is None or source.shape[0] == 1:
        return 0
    alike = [value for value in tables if value.shape is not None and value.shape.rank() == 3 and value.shape[0] == 1]
    if not alike or not isinstance(graph := node.graph, ir.Graph):
        return 0
    props, name = dict(node.metadata_props), node.name or node.outputs[0].name
    ones = ir.Value(name=f"{name}.ones", const_value=ir.tensor([1, 1], name=f"{name}.ones"))
    ones.type, ones.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([2])
    graph.register_initializer(ones)
    batch = ir.node("Shape", [source], {"start": 0, "end": 1}, name=f"{name}.batch", metadata_props=props)
    shape = ir.node("Concat", [batch.outputs[0], ones], {"axis": 0}, name=f"{name}.shape", metadata_props=props)
    added = [batch, shape]
    for each, length in ((batch, 1), (shape, 3)):
        each.outputs[0].type, each.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([length])
        each.outputs[0].name = each.name
    for index, table in enumerate(node.inputs[1:3], start=1):
        if table not in alike:
            continue
        repeated = ir.node("Expand", [table, shape.outputs[0]], name=f"{name}.table{index}", metadata_props=props)
        assert table is not None and table.shape is not None
        out = repeated.outputs[0]
        out.name, out.type, out.shape = repeated.name, table.type, ir.Shape([source.shape[0], *table.shape[1:]])
        node.replace_input_with(index, out)
        added.append(repeated)
    graph.insert_before(node, added)
    return 1


def _quantized(node: ir.Node) -> Refusal | int:
    """Zero points have to be 0."""
    zero = _input(node, 2)
    if zero is None:
        return 0
    tensor = constant_of(zero)
    if tensor is None or tensor.numpy().astype("float32").any():
        return Refusal("quantisation with a zero point that is not 0", "quantise symmetrically, to int8")
    return 0


def _nested(node: ir.Node) -> Refusal | int:
    """An If inside an If needs results of fixed shape."""
    inner = any(each.op_type == "If" for subgraph in subgraphs_of(node) for each in subgraph)
    if inner and not all(out.shape is not None and out.shape.is_static() for out in node.outputs):
        return Refusal("If within If fails where shapes are dynamic", "make it one If, or a Where, in the model")
    return 0


def _refuse(reason: str, way_out: str) -> Rule:
    return lambda _: Refusal(reason, way_out)


_LENGTH = "the length of its result depends on values"
_UNKNOWN = "TensorRT has no such operator"
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Attention": _attention,
        "RotaryEmbedding": _rotary,
        "QuantizeLinear": _quantized,
        "DequantizeLinear": _quantized,
        "If": _nested,
        "NonZero": _refuse(_LENGTH, f"{REPLACE}, by Where, say"),
        "Compress": _refuse(_LENGTH, f"{REPLACE}, by Where, say"),
        "Unique": _refuse(_LENGTH, REPLACE),
        "Det": _refuse(_UNKNOWN, REPLACE),
        "DynamicQuantizeLinear": _refuse(_UNKNOWN, "quantise with fixed scales, by QuantizeLinear"),
        "MatMulNBits": _refuse(
            "it is an operator of ONNX Runtime", "quantise by DequantizeLinear with int4 blocks, or build in fp16"
        ),
    }
)
"""Operator -> its rule."""


def _refused_type(value: ir.Value) -> Refusal | None:
    dtype = value.dtype if isinstance(value.type, ir.TensorType) else None
    if dtype is None or dtype.name in TYPES:
        return None
    if dtype is ir.DataType.DOUBLE:
        return Refusal("float64, which TensorRT would narrow to float32 unasked", "export the model in float32")
    return Refusal(f"TensorRT has no {dtype.name.lower()}", "cast it to int32, or export the model without it")


def _described(node: ir.Node) -> str:
    module = module_of(node)
    return f"{node.op_type} {node.name or ''}".strip() + (f" (module {module})" if module else "")


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _output(node: ir.Node, index: int) -> ir.Value | None:
    return node.outputs[index] if index < len(node.outputs) else None

"""Let query heads share key and value heads: Attention finds them itself, and nothing is copied for it.

Attention(q, Reshape(Expand(Unsqueeze(k))), Reshape(Expand(Unsqueeze(v))))  ->  Attention(q, k, v)

Models that repeat each key and value head for its query heads copy their whole cache for every token.

Source: ONNX operator Attention-23, grouped query attention (q_num_heads is a multiple of kv_num_heads).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from cpcompile.passes.clean_up import same_shape
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import constant_of
from cpcompile.passes.operators import is_standard

KEYS, VALUES, PAST = 1, 2, 4
"""Inputs of Attention; from PAST on, it keeps a cache of its own."""
STEPS = 4
"""The input of a Slice that says how far apart the kept elements are."""


@dataclass(frozen=True)
class GroupQueryHeads(GraphPass):
    """Give Attention the key and value heads that were repeated for it, each once; shapes have to be known."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; nodes that nothing uses any more stay for `CleanUp`."""
        modified = False
        for node in model.graph:
            if node.op_type != "Attention" or not is_standard(node) or any(node.inputs[PAST:]):
                continue
            keys, values = (_repeated(node.inputs[index]) for index in (KEYS, VALUES))
            if keys is not None and values is not None and _shape(keys)[:3] == _shape(values)[:3]:
                node.replace_input_with(KEYS, keys)
                node.replace_input_with(VALUES, values)
                modified = True
        return ir.passes.PassResult(model, modified)


def _repeated(copies: ir.Value | None) -> ir.Value | None:
    """The value (batch, heads, tokens, channels) whose every head stands in `copies` several times in a row."""
    expanded = _input_of(copies, "Reshape")
    single = _whole(_input_of(expanded, "Expand"))
    heads = _input_of(single, "Unsqueeze")
    if copies is None or expanded is None or single is None or heads is None:
        return None
    shape, repeated, times = _shape(heads), _shape(copies), _shape(expanded)
    if len(shape) != 4 or len(times) != 5 or not isinstance(shape[1], int) or not isinstance(times[2], int):
        return None
    batch, count, *rest = shape
    if _shape(single) != (batch, count, 1, *rest) or times != (batch, count, times[2], *rest):
        return None
    return _whole(heads) if repeated == (batch, count * times[2], *rest) else None


def _whole(value: ir.Value | None) -> ir.Value | None:
    """What `value` is a slice of, if that slice takes everything."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type != "Slice" or not is_standard(node):
        return value
    steps = node.inputs[STEPS] if len(node.inputs) > STEPS else None
    step = None if steps is None else constant_of(steps)
    in_order = steps is None or (step is not None and bool((step.numpy() == 1).all()))
    return _whole(node.inputs[0]) if in_order and same_shape(node.inputs[0], value) else value


def _input_of(value: ir.Value | None, operator: str) -> ir.Value | None:
    """The first input of the node that computes `value`, if that is an `operator`."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == operator and is_standard(node) else None


def _shape(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    """Lengths and their names; () if one is unknown."""
    return () if value.shape is None or value.shape.has_unknown_dim() else tuple(value.shape)

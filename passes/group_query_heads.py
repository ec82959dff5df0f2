"""Let query heads share key and value heads: Attention finds them itself, and nothing is copied for it.

Attention(q, Reshape(Expand(Unsqueeze(k))), Reshape(Expand(Unsqueeze(v))))  ->  Attention(q, k, v)

Models that repeat each key and value head for its query heads copy their whole cache for every token.

Source: ONNX operator Attention-23, grouped query attention (q_num_heads is a multiple of kv_num_heads).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from cpcompile.passes.clean_up import unsliced
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.nodes import known_shape, made_by
from cpcompile.passes.operators import is_standard

KEYS, VALUES, PAST = 1, 2, 4
"""Inputs of Attention; from PAST on, it keeps a cache of its own."""


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
            if keys is not None and values is not None and known_shape(keys)[:3] == known_shape(values)[:3]:
                node.replace_input_with(KEYS, keys)
                node.replace_input_with(VALUES, values)
                modified = True
        return ir.passes.PassResult(model, modified)


def _repeated(copies: ir.Value | None) -> ir.Value | None:
    """The value (batch, heads, tokens, channels) whose every head stands in `copies` several times in a row."""
    expanded = _input_of(copies, "Reshape")
    single = unsliced(_input_of(expanded, "Expand"))
    heads = _input_of(single, "Unsqueeze")
    if copies is None or expanded is None or single is None or heads is None:
        return None
    shape, repeated, times = known_shape(heads), known_shape(copies), known_shape(expanded)
    if len(shape) != 4 or len(times) != 5 or not isinstance(shape[1], int) or not isinstance(times[2], int):
        return None
    batch, count, *rest = shape
    if known_shape(single) != (batch, count, 1, *rest) or times != (batch, count, times[2], *rest):
        return None
    return unsliced(heads) if repeated == (batch, count * times[2], *rest) else None


def _input_of(value: ir.Value | None, operator: str) -> ir.Value | None:
    node = made_by(value, operator)
    return None if node is None else node.inputs[0]

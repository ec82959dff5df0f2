"""Recognise mixtures of experts in a graph: what TopK chooses among, and what is looked up by its choice.

    logits -> mask (-inf) -> softmax -> TopK -> numbers -> Gather or GatherND (stacked, numbers)

A mask is Where(constant, -inf, x), Where(constant, x, -inf) or Add(x, constant), and may stand anywhere before TopK.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.nodes import constant_of, int_attribute
from cpcompile.passes.operators import is_standard

Mask = npt.NDArray[np.bool_]
MOVES = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that pass on the elements of their first input unchanged."""


@dataclass(frozen=True)
class Choice:
    """What a TopK chooses among: `logits`, of which the `masked` ones are never chosen."""

    logits: ir.Value
    trail: tuple[ir.Node, ...]
    """The nodes from TopK back to the logits, masks included."""
    masked: Mask

    @property
    def count(self) -> int:
        """The number of experts, masked ones included."""
        return self.masked.size


def choice_of(topk: ir.Node) -> Choice | None:
    """What `topk` chooses among along the last axis; None if it does something else, or nothing is masked."""
    value = topk.inputs[0]
    count = length_of(value, -1)
    if value is None or not count or not _along_last(topk, value) or not int_attribute(topk, "largest", 1):
        return None
    trail: list[ir.Node] = []
    masked = np.zeros(count, dtype=np.bool_)
    while (node := value.producer()) is not None and is_standard(node):
        own, source = _mask(node, count), node.inputs[0]
        if own is not None:
            source, more = own
            masked = masked | more
        elif node.op_type not in ("Cast", "Identity", "Softmax") or not _along_last(node, value):
            break
        elif node.op_type == "Softmax" and masked.any():
            break  # what is masked only after the softmax still contributes to it
        if source is None or length_of(source, -1) != count:
            break
        trail.append(node)
        value = source
    return Choice(value, tuple(trail), masked) if masked.any() else None


def _mask(node: ir.Node, count: int) -> tuple[ir.Value | None, Mask] | None:
    """What `node` masks, and which of its channels; None if it is no mask."""
    arrays = [None if (t := _constant(value)) is None else t.numpy() for value in node.inputs]
    chosen: Mask | None = None
    source = None
    for at, array in enumerate(arrays):
        if array is None or chosen is not None:
            continue
        if node.op_type == "Add":
            chosen, source = np.isneginf(array), node.inputs[1 - at]
        elif node.op_type == "Where" and at > 0 and arrays[0] is not None and np.isneginf(array).all():
            chosen, source = arrays[0] == (at == 1), node.inputs[3 - at]
    if chosen is None or chosen.size != count or chosen.shape[-1] != count:
        return None
    return source, chosen.reshape(count)


def lookups_of(topk: ir.Node, count: int) -> list[ir.Node] | str:
    """The nodes that look up one of `count` by what `topk` chose; or why others must not read these numbers."""
    lookups, waiting = [], [topk.outputs[1]]
    while waiting:
        numbers = waiting.pop()
        if numbers.is_graph_output():
            return f"the numbers of the experts are the output {numbers.name!r} of the model"
        for node, at in numbers.uses():
            known = node.graph is topk.graph and is_standard(node)
            if known and at == 0 and node.op_type in MOVES:
                waiting.append(node.outputs[0])
            elif known and at == 1 and length_of(node.inputs[0], axis_of(node)) == count and _is_lookup(node):
                lookups.append(node)
            elif not known or node.op_type not in ("Shape", "Size"):
                return f"{node.op_type} {node.name!r} reads the numbers of the experts, which would change"
    return lookups


def axis_of(lookup: ir.Node) -> int:
    """The axis along which a Gather, or a GatherND with one index, picks."""
    return int_attribute(lookup, "axis", 0) if lookup.op_type == "Gather" else 0


def _is_lookup(node: ir.Node) -> bool:
    if node.op_type == "GatherND":
        return not int_attribute(node, "batch_dims", 0) and length_of(node.inputs[1], -1) == 1
    return node.op_type == "Gather"


def parameters_of(value: ir.Value | None, count: int, *, contracted: bool = False) -> list[str]:
    """Initializers with `count` positions along some axis that make up `value`, with at most one contraction."""
    node = None if value is None else value.producer()
    if value is None or node is None:
        dims = () if value is None or value.shape is None or not value.is_initializer() else tuple(value.shape)
        return [value.name or ""] if value is not None and count in dims else []
    contracts = node.op_type in ("Gemm", "MatMul") and not contracted
    if not contracts and node.op_type not in ("Add", *MOVES):
        return []
    sources = node.inputs[1:] if contracts else node.inputs
    return [name for source in sources for name in parameters_of(source, count, contracted=contracted or contracts)]


def length_of(value: ir.Value | None, axis: int) -> int | None:
    """The length of an axis if it is known."""
    length = value.shape[axis] if value is not None and value.shape is not None and value.shape.rank() else None
    return length if isinstance(length, int) else None


def _along_last(node: ir.Node, value: ir.Value) -> bool:
    """Whether the operator, if it works along an axis, works along the last one."""
    rank = 0 if value.shape is None else value.shape.rank()
    return rank > 0 and int_attribute(node, "axis", -1) % rank == rank - 1


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else constant_of(value)

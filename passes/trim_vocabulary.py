"""Keep only a part of the vocabulary: new token ids in, logits of the new ids out.

Every table that the ids look up, and the logits, get a Gather of the kept entries:

    Gather(table, ids)  ->  Gather(Gather(table, kept), ids)      logits  ->  Gather(logits, kept, axis=-1)

Nothing needs the other entries then, and `EliminateDeadChannels` cuts them: rows of the table, columns of the
head, its bias. A tied weight is both table and head, and stays one; if it is stored as the head reads it, the ids look
up its columns. A Gather that selects everything goes as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.passes.clean_up import CleanUp, replace_value
from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels, Elimination, KeptChannels, find_channels
from cpcompile.passes.nodes import add_constant, constant_of, int_attribute
from cpcompile.passes.operators import is_standard
from cpcompile.passes.opset import MinOpsetPass

MARK = "cpcompile.vocabulary"
"""Property of a trimmed model: a digest of the kept ids, because new ids cannot be told from old ones."""
MOVES = ("Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that pass on values of their first input unchanged."""


@dataclass
class Trimming(ir.passes.PassResult):
    """`kept`: initializer -> per axis the channels left of what it was before; None where the axis is whole."""

    kept: KeptChannels = field(default_factory=dict)


@dataclass(frozen=True)
class TrimVocabulary(MinOpsetPass):
    """Keep the tokens `kept` (old ids, ascending) of the vocabulary that `ids` and `logits` refer to.

    UsageError if the settings do not fit the model; CpcompileError if an operator needs the vocabulary whole
    (the model is then of no further use: the pass works in place).
    """

    kept: tuple[int, ...] = field(repr=False)
    ids: str = "input_ids"
    logits: str = "logits"
    clean_up: CleanUp = field(default_factory=CleanUp)

    def __post_init__(self) -> None:
        if not self.kept or self.kept[0] < 0 or any(a >= b for a, b in pairwise(self.kept)):
            raise UsageError(f"kept ids have to be ascending from 0 on, and at least one; these begin {self.kept[:5]}")

    def call(self, model: ir.Model) -> Trimming:
        """Edit `model`; `modified` says whether its vocabulary got smaller."""
        graph, index = model.graph, np.asarray(self.kept, dtype="<i8")
        digest = hashlib.sha256(index.tobytes()).hexdigest()
        if model.metadata_props.get(MARK, digest) != digest:
            raise UsageError("the model is trimmed to another vocabulary already; start from the whole model")
        logits = _named(graph.outputs, self.logits, "output")
        lookups = _find_lookups(graph, _named(graph.inputs, self.ids, "input"))
        tables = list(dict.fromkeys(map(_table_of, lookups)))
        size = _common_length(tables, logits)
        if MARK in model.metadata_props or len(self.kept) == size == self.kept[-1] + 1:
            return Trimming(model, False, {n: (None,) * len(v.shape or ()) for n, v in graph.initializers.items()})
        if self.kept[-1] >= size:
            raise UsageError(f"token {self.kept[-1]} is to be kept, the model has the tokens 0 to {size - 1}")

        kept = add_constant(graph, f"{self.logits}.kept", index)
        whole = _pick(logits, kept, -1)
        graph.append(whole)
        graph.outputs[graph.outputs.index(logits)] = whole.outputs[0]
        logits.name, whole.outputs[0].name = f"{self.logits}.whole", self.logits
        picks = [whole]
        for table, axis in tables:
            picks.append(_pick(table, kept, axis))
            users = [node for node in lookups if _table_of(node) == (table, axis)]
            graph.insert_before(next(node for node in graph if node in users), picks[-1])
            for node in users:
                node.replace_input_with(0, picks[-1].outputs[0])
        eliminated = EliminateDeadChannels(self.clean_up)(model)
        assert isinstance(eliminated, Elimination)
        for node in picks:
            _drop_pick(graph, node)
        self.clean_up(model)
        model.metadata_props[MARK] = digest
        return Trimming(model, True, {n: axes for n, axes in eliminated.kept.items() if n in graph.initializers})


def renumber_interface(model: ir.Model, trim: TrimVocabulary) -> None:
    """Make the whole `model` take new ids and give their logits, to compare it with what `trim` makes of it."""
    graph = model.graph
    ids, logits = _named(graph.inputs, trim.ids, "input"), _named(graph.outputs, trim.logits, "output")
    assert ids.dtype is not None
    old, whole = (
        add_constant(graph, f"{name}.old", np.asarray(trim.kept, dtype=dtype.numpy()))
        for name, dtype in ((trim.ids, ids.dtype), (trim.logits, ir.DataType.INT64))
    )
    lookup = ir.node("Gather", [old, ids], name=f"{trim.ids}.renumbered")
    lookup.outputs[0].name = lookup.name
    for node, index in ids.uses():
        if node is not lookup:
            node.replace_input_with(index, lookup.outputs[0])
    graph.insert_before(graph[0], lookup)
    picked = ir.node("Gather", [logits, whole], {"axis": -1}, name=f"{trim.logits}.picked")
    graph.append(picked)
    graph.outputs[graph.outputs.index(logits)] = picked.outputs[0]
    logits.name, picked.outputs[0].name = f"{trim.logits}.whole", trim.logits
    picked.outputs[0].type = logits.type


def compose_kept(first: KeptChannels, then: KeptChannels) -> KeptChannels:
    """The channels of the original that two passes leave; `then` counts those that `first` left."""
    return {
        name: tuple(b if a is None else a if b is None else a[b] for a, b in zip(first[name], axes, strict=True))
        for name, axes in then.items()
        if name in first
    }


def _named(values: Sequence[ir.Value], name: str, what: str) -> ir.Value:
    value = next((value for value in values if value.name == name), None)
    if value is None:
        raise UsageError(f"the model has no {what} {name!r}; it has {', '.join(str(v.name) for v in values)}")
    return value


def _table_of(lookup: ir.Node) -> tuple[ir.Value, int]:
    """The table of a Gather, and the axis on which it picks."""
    table = lookup.inputs[0]
    assert table is not None
    return table, int_attribute(lookup, "axis", 0) % (table.shape.rank() if table.shape is not None else 1)


def _find_lookups(graph: ir.Graph, ids: ir.Value) -> list[ir.Node]:
    """The nodes that look up a table by the ids; nothing else may read what the ids are."""
    lookups, todo = [], [ids]
    while todo:
        for node, at in todo.pop().uses():
            known = node.graph is graph and is_standard(node)
            cast = node.op_type == "Cast" and int_attribute(node, "to", 0) in (ir.DataType.INT32, ir.DataType.INT64)
            if known and node.op_type == "Gather" and at == 1:
                lookups.append(node)
            elif known and at == 0 and (cast or node.op_type in MOVES):
                todo.append(node.outputs[0])
            elif not known or node.op_type not in ("Shape", "Size"):
                raise CpcompileError(
                    f"{node.op_type} {node.name!r} reads the token ids {ids.name!r} themselves, and new ids would "
                    "change its result; they may only look up tables (Gather)"
                )
    if not lookups:
        raise CpcompileError(f"no table is looked up by {ids.name!r} (Gather); name the input of token ids")
    return lookups


def _common_length(tables: Sequence[tuple[ir.Value, int]], logits: ir.Value) -> int:
    """The size of the vocabulary: rows of every table, channels of the logits."""
    size = logits.shape[-1] if logits.shape is not None and logits.shape.rank() else None
    if not isinstance(size, int):
        raise CpcompileError(f"{logits.name!r} is of shape {logits.shape}; its last axis has to be the vocabulary")
    for table, axis in tables:
        if table.shape is None or table.shape[axis] != size:
            raise CpcompileError(
                f"the last axis of {logits.name!r} is not the vocabulary: it is {size} long, the table {table.name!r} "
                f"is of shape {table.shape}; name the output that holds logits"
            )
    return size


def _pick(data: ir.Value, kept: ir.Value, axis: int) -> ir.Node:
    """A Gather of the `kept` entries of `data`."""
    assert data.shape is not None and kept.shape is not None
    dims = list(data.shape)
    dims[axis] = kept.shape[0]
    node = ir.node("Gather", [data, kept], {"axis": axis}, name=f"{data.name}.trimmed")
    out = node.outputs[0]
    out.name, out.type, out.shape = f"{data.name}.trimmed", data.type, ir.Shape(dims)
    return node


def _drop_pick(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a Gather that takes everything in order; an error says what keeps the rest."""
    data, index, axis = node.inputs[0], node.inputs[1], int_attribute(node, "axis", 0)
    assert data is not None and data.shape is not None and index is not None
    picked, length = constant_of(index), data.shape[axis]
    assert picked is not None and isinstance(length, int)
    spare = np.setdiff1d(np.arange(length), picked.numpy())
    if spare.size:
        reasons = find_channels(graph).reasons((data, axis % data.shape.rank()))[spare]
        why = next((f"{r.operator} {r.node!r}: {r.text}" for r in reasons if r is not None), "an unknown reason")
        raise CpcompileError(
            f"{spare.size} of the {length} entries of {data.name!r} cannot be trimmed because of {why}; "
            "give the logits before that operator, or leave the vocabulary whole"
        )
    replace_value(data, node.outputs[0])
    graph.remove(node, safe=True)

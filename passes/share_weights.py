"""Store the weights that contexts share once.

The contexts that keep a channel are its partition. Along the one axis on which the contexts differ, a
parameter falls into runs of channels of the same partition; every run is stored once, and a
context's tensor is the sequence of its runs:

    x @ [W1 | W2]  =  [x @ W1 | x @ W2]           runs of output channels: results are joined
    [x1 | x2] @ [W1 ; W2]  =  x1 @ W1 + x2 @ W2   runs of input channels: the input is split

so that no engine has to join weights in memory (a Concat of weights folded at load costs half as
much again). Models whose units are stored partition by partition have one run per partition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.core.rounding import Calibrated
from cpcompile.passes.clean_up import replace_value
from cpcompile.passes.graph_pass import GraphPass

KeptChannels = Mapping[str, tuple[npt.NDArray[np.intp] | None, ...]]
"""Parameter name -> per axis the kept indices; None where the axis is whole."""


@dataclass(frozen=True)
class Whole:
    """A parameter of all contexts: its shape, how its elements are read, and what they are rounded to."""

    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[np.generic]]
    calibrated: Calibrated = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A piece of parameter `name` that the same contexts keep: `channels` along `axis` (None: the tensor as it is)."""

    name: str
    contexts: tuple[str, ...]
    kept: tuple[npt.NDArray[np.intp] | None, ...]
    axis: int | None
    number: int
    of: int

    @property
    def stored_name(self) -> str:
        """Name of the piece in graphs and in the weights file."""
        return self.name if self.of == 1 else f"{self.name}[{self.number}]"

    def cut(self, tensor: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The piece of the whole tensor."""
        for axis, indices in enumerate(self.kept):
            if indices is not None:
                tensor = np.take(tensor, indices, axis=axis)
        return np.ascontiguousarray(tensor)


Plan = Mapping[str, tuple[Run, ...]]
"""Parameter name -> its runs in the order of the channels."""


def plan_runs(kept: Mapping[str, KeptChannels], shapes: Mapping[str, Sequence[int]]) -> Plan:
    """The runs of every parameter, from its whole shape and what each context keeps of it."""
    names = dict.fromkeys(name for channels in kept.values() for name in channels)
    return {
        name: _runs_of(name, shapes[name], {c: channels[name] for c, channels in kept.items() if name in channels})
        for name in names
    }


@dataclass(frozen=True)
class ShareWeights(GraphPass):
    """Replace the parameters of one context's graph by their runs."""

    context: str
    plan: Plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`; `modified` says whether a parameter was split into runs."""
        split = 0
        for name, value in list(model.graph.initializers.items()):
            runs = [run for run in self.plan.get(name, ()) if self.context in run.contexts]
            if not runs or runs[0].of == 1:
                continue
            _split_into_runs(model.graph, value, runs)
            split += 1
        return ir.passes.PassResult(model, modified=split > 0)


def _runs_of(
    name: str, shape: Sequence[int], kept: Mapping[str, tuple[npt.NDArray[np.intp] | None, ...]]
) -> tuple[Run, ...]:
    contexts = tuple(kept)
    first = kept[contexts[0]]
    differing = [axis for axis in range(len(first)) if any(not _same(k[axis], first[axis]) for k in kept.values())]
    if not differing:
        return (Run(name, contexts, first, None, 0, 1),)
    if len(differing) > 1:
        # Contexts that differ on two axes share no contiguous piece: each stores its own tensor.
        return tuple(Run(name, (c,), kept[c], None, i, len(contexts)) for i, c in enumerate(contexts))
    axis = differing[0]
    members: dict[int, tuple[str, ...]] = {}
    for context, own in kept.items():
        indices = own[axis]
        for channel in range(shape[axis]) if indices is None else indices.tolist():
            members[channel] = (*members.get(channel, ()), context)
    pieces: list[tuple[tuple[str, ...], list[int]]] = []
    for channel in sorted(members):
        if pieces and pieces[-1][0] == members[channel]:
            pieces[-1][1].append(channel)
        else:
            pieces.append((members[channel], [channel]))
    return tuple(
        Run(
            name,
            owners,
            tuple(np.asarray(channels, dtype=np.intp) if a == axis else k for a, k in enumerate(first)),
            axis,
            number,
            len(pieces),
        )
        for number, (owners, channels) in enumerate(pieces)
    )


def _same(a: npt.NDArray[np.intp] | None, b: npt.NDArray[np.intp] | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))


def _split_into_runs(graph: ir.Graph, value: ir.Value, runs: Sequence[Run]) -> None:
    """Replace the parameter `value` by its runs in every node that reads it."""
    tensor = value.const_value
    assert tensor is not None and value.name is not None
    if len(runs) == 1:
        graph.initializers.pop(value.name)
        value.name = runs[0].stored_name
        graph.register_initializer(value)
        return
    axis = runs[0].axis
    assert axis is not None
    pieces, start, shape = [], 0, tensor.shape.numpy()
    sizes = [len(indices) for run in runs if (indices := run.kept[axis]) is not None]
    for run, size in zip(runs, sizes, strict=True):
        piece = _piece(tensor, run.stored_name, axis, start, size)
        start += size
        stored = ir.Value(name=run.stored_name, shape=piece.shape, type=value.type, const_value=piece)
        graph.register_initializer(stored)
        pieces.append(stored)
    joined: ir.Value | None = None
    for use in value.uses():
        node, index = use
        rank = len(shape)
        if node.op_type == "MatMul" and index == 1 and rank == 2 and axis == 1:
            _join_outputs(node, pieces)
        elif node.op_type == "MatMul" and index == 1 and rank == 2 and axis == 0:
            _split_input(node, pieces, sizes)
        else:
            if joined is None:
                readers = {reader for reader, _ in value.uses()}
                first = next(each for each in graph if each in readers)
                joined = _insert_before(first, "Concat", pieces, {"axis": axis}, f"{value.name}.joined", value)
            node.replace_input_with(index, joined)
    graph.initializers.pop(value.name)


def _piece(tensor: ir.TensorProtocol, name: str, axis: int, start: int, size: int) -> ir.LazyTensor:
    """`size` positions of `tensor` from `start` on, cut only when read: in a bundle, the weights file has them."""

    def cut() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().take(range(start, start + size), axis=axis), name=name)

    shape = [size if a == axis else length for a, length in enumerate(tensor.shape.numpy())]
    return ir.LazyTensor(cut, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)


def _join_outputs(node: ir.Node, pieces: Sequence[ir.Value]) -> None:
    """x @ [W1 | W2] -> Concat(x @ W1, x @ W2)."""
    out = node.outputs[0]
    results = [
        _insert_before(node, "MatMul", [node.inputs[0], piece], {}, f"{out.name}[{i}]", None)
        for i, piece in enumerate(pieces)
    ]
    _replace(node, _insert_before(node, "Concat", results, {"axis": -1}, f"{out.name}.joined", out))


def _split_input(node: ir.Node, pieces: Sequence[ir.Value], sizes: Sequence[int]) -> None:
    """x @ [W1 ; W2] -> x1 @ W1 + x2 @ W2 with x1, x2 = Split(x)."""
    out, x = node.outputs[0], node.inputs[0]
    graph = node.graph
    assert graph is not None and isinstance(graph, ir.Graph)
    name = f"{out.name}.sizes"
    split_sizes = ir.Value(
        name=name,
        shape=ir.Shape((len(sizes),)),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.asarray(sizes, dtype=np.int64), name=name),
    )
    graph.register_initializer(split_sizes)
    split = ir.node(
        "Split",
        [x, split_sizes],
        {"axis": -1},
        num_outputs=len(sizes),
        name=f"{node.name}.split",
        metadata_props=dict(node.metadata_props),
    )
    for i, part in enumerate(split.outputs):
        part.name = f"{out.name}.in[{i}]"
    graph.insert_before(node, split)
    total: ir.Value | None = None
    for i, (part, piece) in enumerate(zip(split.outputs, pieces, strict=True)):
        product = _insert_before(node, "MatMul", [part, piece], {}, f"{out.name}[{i}]", None)
        total = (
            product if total is None else _insert_before(node, "Add", [total, product], {}, f"{out.name}.sum{i}", out)
        )
    assert total is not None
    _replace(node, total)


def _insert_before(
    node: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int],
    name: str,
    like: ir.Value | None,
) -> ir.Value:
    """A new node before `node`; returns its output, typed like `like` where given."""
    new = ir.node(operator, inputs, dict(attributes), name=name, metadata_props=dict(node.metadata_props))
    out = new.outputs[0]
    out.name = name
    if like is not None:
        out.type, out.shape = like.type, like.shape
    assert node.graph is not None
    node.graph.insert_before(node, new)
    return out


def _replace(node: ir.Node, value: ir.Value) -> None:
    """Replace the only output of `node` by `value`, which takes over its name."""
    assert node.graph is not None
    name = node.outputs[0].name
    replace_value(value, node.outputs[0])
    node.graph.remove(node, safe=True)
    value.name = name

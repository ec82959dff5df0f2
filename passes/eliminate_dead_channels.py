"""Remove channels whose absence makes no difference: the graph gets physically smaller.

    1. zero terms   x + 0 -> x, so that branches in which nothing is left disappear
    2. zeros        forward: which slices of every tensor are zero            (rules: zeros)
    3. cut          greatest fixpoint: which channels every operator can spare (rules: agree)
    4. rewrite      slice initializers, sizes, indices and shapes             (rules: rewrite)
    until nothing changes.

Works on any graph with structural zeros. A contraction sum(a_k * b_k) loses the terms in which a or b is zero;
everything coupled with such a channel (the matrix columns that make it, the activations
that carry it) goes with it. Exact for finite values: 0 * x = 0. Subgraphs of If, Loop and Scan are part of the graph;
a call to a function keeps what it touches, so inline functions first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.core.cache import PRESENT
from cpcompile.passes.cache_interface import caches, remove_idle_caches
from cpcompile.passes.channel_rules import rule_of
from cpcompile.passes.channel_rules.fixpoint import find_channels, find_zeros
from cpcompile.passes.channels import Channels, Mask
from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.constant_copies import merge_copies, separate_constants
from cpcompile.passes.infer_shapes import complete_shapes
from cpcompile.passes.nodes import post_order
from cpcompile.passes.opset import MinOpsetPass
from cpcompile.passes.quantized_zeros import stuck_zeros
from cpcompile.passes.remove_empty_layers import remove_zero_terms

__all__ = ["Blocked", "EliminateDeadChannels", "Elimination", "KeptChannels", "find_channels"]

Kept = tuple[npt.NDArray[np.intp] | None, ...]
"""Per axis the kept channels of the original tensor; None where the axis is whole."""
KeptChannels = Mapping[str, Kept]
"""Initializer of the graph (subgraphs read them from there, too) -> what is left of it."""


@dataclass(frozen=True)
class Blocked:
    """Zero channels that had to stay, and the operator that is the reason."""

    value: str
    axis: int
    channels: int
    node: str
    operator: str
    reason: str


@dataclass
class Elimination(ir.passes.PassResult):
    """What was removed: initializers that are gone are absent from `kept`."""

    kept: KeptChannels = field(default_factory=dict)
    blocked: tuple[Blocked, ...] = ()


@dataclass(frozen=True)
class EliminateDeadChannels(MinOpsetPass):
    """Remove dead channels until none is left that the rules can remove.

    The values of what `clean_up` protects are ignored: a parameter that happens to be zero, such as a new bias, stays.
    """

    clean_up: CleanUp = field(default_factory=CleanUp)
    cut_caches: bool = False
    """The heads of a language model's cache go with those of its layers: callers read its shapes from the graph."""

    def may_remove(self, output: str) -> bool:
        return self.cut_caches and PRESENT.fullmatch(output) is not None

    def call(self, model: ir.Model) -> Elimination:
        """Edit `model`; `modified` counts removed terms, tensors that got smaller and what was cleaned up."""
        graph = model.graph
        complete_shapes(model)
        edits = int(self.clean_up(model).modified)  # what nothing needs must not keep channels
        copies = separate_constants([graph, *graph.subgraphs()])
        given = {value for value in graph.initializers.values() if value.const_value is not None}
        kept: dict[ir.Value, Kept] = {}
        round_edits = 1
        while round_edits:
            zeros = find_zeros(graph, self.clean_up.protected)
            round_edits = len(remove_zero_terms(graph, zeros))
            if self.cut_caches and round_edits:
                self.clean_up(model)  # the attention of a layer without heads
                remove_idle_caches(model, self.clean_up)
            free = frozenset(chain(*caches(graph).items())) if self.cut_caches else frozenset[ir.Value]()
            zeros = find_zeros(graph, self.clean_up.protected) if round_edits else zeros
            channels = find_channels(graph, zeros, free)
            smaller, sliced = _rewrite(graph, channels)
            for value, own in sliced.items():
                before = kept.get(value, (None,) * len(own))
                kept[value] = tuple(_then(old, new) for old, new in zip(before, own, strict=True))
            round_edits += smaller
            edits += round_edits
            if round_edits:
                self.clean_up(model)
        merge_copies(copies, kept)
        names = {
            name: kept.get(value, (None,) * len(value.shape or ()))
            for name, value in graph.initializers.items()
            if value in given  # rewritten settings have no original
        }
        return Elimination(model, edits > 0, names, (*_blocked(channels), *_stuck(graph)))


def _rewrite(graph: ir.Graph, channels: Channels) -> tuple[int, dict[ir.Value, Kept]]:
    """Cut the channels that the masks mark.

    Returns how many values got smaller, and per sliced initializer the kept channels of every axis.
    """
    cut: dict[ir.Value, dict[int, Mask]] = {}
    for (value, axis), mask in channels.cells:
        if mask.any():
            cut.setdefault(value, {})[axis] = mask
    for node in list(post_order(graph)):
        if (rule := rule_of(node)) and any(value in cut for value in (*node.inputs, *node.outputs)):
            rule.rewrite(channels, node)
    sliced = {}
    for value, masks in cut.items():
        if value.shape is not None:
            dims = list(value.shape)
            for axis, mask in masks.items():
                dims[axis] = int((~mask).sum()) if isinstance(dims[axis], int) else ir.SymbolicDim(None)
            value.shape = ir.Shape(dims)
        if value.is_initializer():
            rank = len(value.const_value.shape) if value.const_value is not None else 0
            sliced[value] = tuple(np.flatnonzero(~masks[axis]) if axis in masks else None for axis in range(rank))
            _slice_initializer(value, sliced[value])
    return len(cut), sliced


def _slice_initializer(value: ir.Value, kept: Kept) -> None:
    """Replace the tensor by its slice, which is made only when it is read."""
    tensor = value.const_value
    assert tensor is not None and value.shape is not None

    def make() -> ir.TensorProtocol:
        array = tensor.numpy()
        for axis, indices in enumerate(kept):
            if indices is not None:
                array = array.take(indices, axis=axis)
        return ir.Tensor(array, name=value.name)

    value.const_value = ir.LazyTensor(make, dtype=tensor.dtype, shape=value.shape, name=value.name)


def _then(before: npt.NDArray[np.intp] | None, now: npt.NDArray[np.intp] | None) -> npt.NDArray[np.intp] | None:
    """Kept channels of kept channels, in terms of the original."""
    return before if now is None else now if before is None else before[now]


def _blocked(channels: Channels) -> tuple[Blocked, ...]:
    """Zero channels of activations that stayed, by value, axis and reason."""
    blocked: list[Blocked] = []
    for (value, axis), mask in channels.cells:
        zeros = channels.zeros.get(value)
        if zeros is None or zeros.everything or value.producer() is None:
            continue
        stayed = Counter(channels.reasons((value, axis))[zeros.axes[axis] & ~mask])
        blocked += [
            Blocked(value.name or "", axis, count, reason.node, reason.operator, reason.text)
            for reason, count in stayed.items()
            if reason is not None
        ]
    return tuple(blocked)


def _stuck(graph: ir.Graph) -> tuple[Blocked, ...]:
    """Zero channels of quantised weights that no rule can cut."""
    return tuple(
        Blocked(weight.name or "", axis, count, node.name or "", node.op_type, f"there is no rule for {node.op_type}")
        for node, weight, axis, count in stuck_zeros(graph)
    )

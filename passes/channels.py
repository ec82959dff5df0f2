"""What is known about the channels of every value: which are zero, and which can be cut.

Both are boolean masks, one per axis (over its known factor, see `axes`):

    zero   forward: the slice is zero whatever the inputs are
    cut    greatest fixpoint: starts with everything, and every operator takes away what it cannot
           spare, until all operators agree

A mask that shrinks remembers the operator responsible, so that a report can say why zeros had to stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.axes import Shape
from cpcompile.passes.nodes import constant_of
from cpcompile.passes.symbolic_shapes import ShapeTable

Mask = npt.NDArray[np.bool_]
NOT_ZERO = "its channels are not zero"
EMPTY = "it would be empty: one channel has to stay"
Cell = tuple[ir.Value, int]
"""A value and one of its axes."""


@dataclass(frozen=True)
class Zeros:
    """Zero slices per axis; `everything` if the whole value is zero."""

    axes: tuple[Mask, ...]
    everything: bool = False

    @classmethod
    def of(cls, axes: Sequence[Mask], *, everything: bool = False) -> Zeros:
        """Normalised: a value that is zero along a whole axis is zero everywhere."""
        everything = everything or any(mask.all() for mask in axes if mask.size)
        return cls(tuple(np.full_like(mask, everything) | mask for mask in axes), everything)

    @classmethod
    def none(cls, shape: Shape) -> Zeros:
        """Nothing is known to be zero."""
        return cls(tuple(np.zeros(axis.n, dtype=np.bool_) for axis in shape))

    @classmethod
    def of_constant(cls, array: npt.NDArray[np.generic], zero: npt.ArrayLike = 0) -> Zeros:
        """Where a constant is `zero`."""
        nonzero = array != zero
        axes = range(array.ndim)
        masks = [~nonzero.any(axis=tuple(other for other in axes if other != axis)) for axis in axes]
        return cls.of(masks, everything=not nonzero.any())


@dataclass(frozen=True)
class Reason:
    """The operator that keeps channels, and why."""

    node: str
    operator: str
    text: str


@dataclass
class Channels:
    """The masks of all values of a graph and its subgraphs, as the rules see and shrink them."""

    table: ShapeTable
    owners: Mapping[ir.Value, ir.Node] = field(default_factory=dict)
    """Input or output of a subgraph (of an If, Loop, Scan) -> the node that the subgraph belongs to."""
    opaque: frozenset[str] = frozenset()
    """Initializers whose values are ignored."""
    zeros: dict[ir.Value, Zeros] = field(default_factory=dict)
    _cut: dict[Cell, Mask] = field(default_factory=dict)
    _reasons: dict[Cell, npt.NDArray[np.object_]] = field(default_factory=dict)
    changed: dict[ir.Node, None] = field(default_factory=dict)
    """Nodes to look at again, in the order in which they were found."""
    _seen: set[Cell] = field(default_factory=set)
    settled: bool = False
    """All operators agree: an axis that none of them considered stays whole."""

    def neighbours(self, value: ir.Value) -> list[ir.Node]:
        """Nodes whose rules concern `value`: its producer, its readers, the owner of a subgraph it enters or leaves."""
        producer, owner = value.producer(), self.owners.get(value)
        nodes = [producer, *(use.node for use in value.uses()), owner]
        return [node for node in nodes if node is not None]

    def shape(self, value: ir.Value | None) -> Shape | None:
        return self.table.shape(value)

    def narrow(self, value: ir.Value, shape: Shape) -> None:
        """Give `value` this shape, and forget what was known about its zeros."""
        self.table.narrow(value, shape)
        self.zeros.pop(value, None)

    def zero(self, value: ir.Value) -> Zeros:
        """The slices of `value` that are known to be zero. Its shape has to be known."""
        if value not in self.zeros:
            shape = self.shape(value)
            assert shape is not None
            tensor = constant_of(value)
            if tensor is not None and tensor.dtype.is_floating_point() and value.name not in self.opaque:
                self.zeros[value] = Zeros.of_constant(tensor.numpy())
            else:
                self.zeros[value] = Zeros.none(shape)
        return self.zeros[value]

    def cut(self, value: ir.Value, axis: int) -> Mask:
        """Channels of `axis` that can be cut, as far as is known."""
        cell = (value, axis)
        self._seen.add(cell)
        if cell not in self._cut:
            shape = self.shape(value)
            assert shape is not None
            # An axis of one channel is kept: without it there would be no value at all.
            self._cut[cell] = uniform(shape[axis].n, shape[axis].n > 1 and not self.settled)
        return self._cut[cell]

    def shrink(self, cell: Cell, mask: Mask, reasons: Reason | npt.NDArray[np.object_]) -> None:
        """Keep what `mask` does not allow to cut; `reasons` says why, for all channels or for each."""
        old = self.cut(*cell)
        lost = old & ~mask
        if not lost.any():
            return
        self._cut[cell] = _shared(old & mask)
        own = self._reasons.setdefault(cell, np.full(old.size, None, dtype=np.object_))
        own[lost] = reasons if isinstance(reasons, Reason) else reasons[lost]
        self.changed.update(dict.fromkeys(self.neighbours(cell[0])))

    def consult(self, node: ir.Node, agree: Callable[[Channels, ir.Node], None]) -> None:
        """Let a rule shrink what `node` touches; an axis that the rule does not consider stays whole."""
        self._seen.clear()
        agree(self, node)
        for value in (*node.inputs, *node.outputs):
            if value is not None and (shape := self.shape(value)) is not None:
                missed = [axis for axis in range(len(shape)) if (value, axis) not in self._seen]
                if missed:
                    self.keep(value, node, f"the rule for {node.op_type} does not cover this axis", axes=missed)

    def couple(self, cells: Iterable[Cell], node: ir.Node, limit: Mask | None = None, why: str = NOT_ZERO) -> None:
        """These axes lose the same channels, and only those that `limit` allows."""
        cells = list(cells)
        masks = [self.cut(*cell) for cell in cells]
        if limit is None and all(mask is masks[0] for mask in masks):
            return  # axes that agree share their mask
        if len({mask.size for mask in masks}) > 1:
            for value, axis in cells:
                self.keep(value, node, "the lengths of its axes may differ", axes=[axis])
            return
        common = np.logical_and.reduce(masks)
        left = common if limit is None else common & limit
        if any((mask != left).any() for mask in masks):
            reasons = np.full(left.size, reason_of(node, why), dtype=np.object_)
            for cell, mask in reversed([*zip(cells, masks, strict=True)]):  # the first that keeps a channel says why
                reasons[~mask] = self.reasons(cell)[~mask]
            for cell in cells:
                self.shrink(cell, left, reasons)
        self._cut.update(dict.fromkeys(cells, _shared(left)))

    def couple_groups(self, cells: Iterable[Cell], groups: int, node: ir.Node, why: str) -> None:
        """Each of these axes consists of `groups` equal runs; a run can be lost only as a whole, and on all axes."""
        cells = list(cells)
        if any(self.cut(*cell).size % groups for cell in cells):
            for value, axis in cells:
                self.keep(value, node, "its length is not a multiple of its groups", axes=[axis])
            return
        runs = [self.cut(*cell).reshape(groups, -1) for cell in cells]
        common = np.logical_and.reduce([run.all(axis=1) for run in runs])
        reasons = np.full(groups, reason_of(node, why), dtype=np.object_)
        for cell, run in zip(cells, runs, strict=True):
            # What keeps a whole group is the reason also elsewhere; what keeps a part of it is not.
            whole = ~run.any(axis=1)
            reasons[whole] = self.reasons(cell).reshape(groups, -1)[whole, 0]
        for cell, run in zip(cells, runs, strict=True):
            self.shrink(cell, np.repeat(common, run.shape[1]), np.repeat(reasons, run.shape[1]))

    def keep(self, value: ir.Value | None, node: ir.Node, why: str, *, axes: Iterable[int] | None = None) -> None:
        """Nothing of `value`, or of these axes of it, can be cut."""
        shape = self.shape(value)
        if value is None or shape is None:
            return
        for axis in range(len(shape)) if axes is None else axes:
            none = uniform(shape[axis].n, False)
            if self.cut(value, axis) is not none:
                self.shrink((value, axis), none, reason_of(node, why))

    def reasons(self, cell: Cell) -> npt.NDArray[np.object_]:
        """Why each channel of this axis has to stay: a Reason, or None."""
        if (known := self._reasons.get(cell)) is not None:
            return known
        size, node = self.cut(*cell).size, cell[0].producer()
        unknown = reason_of(node, EMPTY) if size == 1 and node is not None else None
        return np.full(size, unknown, dtype=np.object_)

    @property
    def cells(self) -> Iterable[tuple[Cell, Mask]]:
        """Every axis that was looked at, with its mask."""
        return self._cut.items()


@cache
def uniform(length: int, cut: bool) -> Mask:
    """The mask of an axis that loses everything or nothing, shared so that it can be compared by identity."""
    mask = np.full(length, cut, dtype=np.bool_)
    mask.setflags(write=False)
    return mask


def _shared(mask: Mask) -> Mask:
    return mask if mask.any() else uniform(mask.size, False)


def equal_losses(cut: Mask, gone: Mask) -> Mask:
    """The part of `cut` (groups, size) that leaves all groups that are not `gone` with the same size."""
    count = cut[~gone].sum(axis=1).min(initial=cut.shape[1])
    return np.asarray(cut & (gone[:, None] | (np.cumsum(cut, axis=1) <= count)))


def reason_of(node: ir.Node, text: str) -> Reason:
    """`node` keeps channels because of `text`."""
    return Reason(node.name or "", node.op_type, text)


def grid_shape(axes: Shape) -> tuple[int, ...] | None:
    """Known factors of a group of axes; None unless all unknown factors come before the first known one."""
    seen = False
    for axis in axes:
        if axis.outer and (seen or any(s.isdigit() for s in axis.outer)):
            return None
        seen = seen or axis.n > 1
    return tuple(axis.n for axis in axes)


def to_grid(masks: Sequence[Mask], shape: tuple[int, ...]) -> Mask:
    """The elements of a group that are marked along any axis, flattened."""
    grid = np.zeros(shape, dtype=np.bool_)
    for axis, mask in enumerate(masks):
        grid |= mask.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return grid.reshape(-1)


def from_grid(grid: Mask, shape: tuple[int, ...]) -> list[Mask]:
    """Per axis the indices whose elements are all marked."""
    cube = grid.reshape(shape)
    others = [tuple(a for a in range(len(shape)) if a != axis) for axis in range(len(shape))]
    return [np.asarray(cube.all(axis=other)) for other in others]

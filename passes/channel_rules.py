"""How every operator treats channels: one rule per operator family, all in the table RULES at the end.

A rule says three things of a node:

    zeros(channels, node)    which slices of its outputs are zero, given those of its inputs
    agree(channels, node)    which channels of inputs and outputs can only be cut together, or not at all
    rewrite(channels, node)  what else changes once they are cut: sizes, indices, shapes

Assumes finite values: 0 * x is 0. Operators: the ONNX standard, docs/Operators.md, opsets 13 to 24.
An operator without a rule keeps all its channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.channels import (
    Cell,
    Channels,
    Mask,
    Zeros,
    from_grid,
    grid_shape,
    match_axes,
    to_grid,
)
from cpcompile.passes.shape_inputs import plan_target_shape, set_integers, set_target_shape
from cpcompile.passes.symbolic_shapes import (
    NOT_ZERO_AT_ZERO,
    ONE,
    ZERO_AT_ZERO,
    Axis,
    Shape,
    axes_of,
    constant_of,
    is_standard,
    number_of,
    permutation,
)

ZerosRule = Callable[[Channels, ir.Node], Sequence[Zeros] | None]
AgreeRule = Callable[[Channels, ir.Node], None]
RewriteRule = Callable[[Channels, ir.Node], None]


def _nothing(_channels: Channels, _node: ir.Node) -> None:
    return None


@dataclass(frozen=True)
class Rule:
    """The behaviour of one operator; `data` of its inputs carry channels, the others are settings."""

    agree: AgreeRule
    zeros: ZerosRule = _nothing
    rewrite: RewriteRule = _nothing
    data: int = 1


def rule_of(node: ir.Node) -> Rule | None:
    """The rule of `node`; None for other domains, operators with sub-graphs, and what is not in the table."""
    if not is_standard(node) or any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    ):
        return None
    return RULES.get(node.op_type)


# Elementwise operators: axes are aligned from the right, axes of length 1 stretch.


def _aligned(channels: Channels, node: ir.Node, inputs: Sequence[ir.Value]) -> list[list[Cell]] | None:
    """Per axis of the output the cells that run along with it; None if shapes are unknown."""
    out = channels.shape(node.outputs[0])
    if out is None:
        return None
    columns: list[list[Cell]] = [[(node.outputs[0], axis)] for axis in range(len(out))]
    for value in inputs:
        shape = channels.shape(value)
        if shape is None:
            return None
        for axis, own in enumerate(shape):
            at = axis + len(out) - len(shape)
            if own.n == out[at].n and own.same_length(out[at]):
                columns[at].append((value, axis))
            elif own != ONE:
                return None
    return columns


def _tie_aligned(which: slice) -> AgreeRule:
    """The axes of the output and of the inputs `which` lose the same channels."""

    def agree(channels: Channels, node: ir.Node) -> None:
        columns = _aligned(channels, node, [value for value in node.inputs[which] if value is not None])
        if columns is None:
            _keep_all(channels, node, "shapes do not tell which channels belong together")
            return
        for cells in columns:
            channels.tie(cells, node)

    return agree


def _keep_all(channels: Channels, node: ir.Node, why: str) -> None:
    for value in (*node.inputs, *node.outputs):
        channels.keep(value, node, why)


def _combined(combine: Callable[[Sequence[Mask]], Mask], which: slice) -> ZerosRule:
    """Zeros of an elementwise result from those of the inputs `which`."""

    def zeros(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
        inputs = [value for value in node.inputs[which] if value is not None]
        columns = _aligned(channels, node, inputs)
        out = channels.shape(node.outputs[0])
        if columns is None or out is None:
            return None
        known = {value: channels.zero(value) for value in inputs}
        masks = []
        for axis, cells in enumerate(columns):
            at_axis = {value: own for value, own in cells if value in known}
            masks.append(
                combine(
                    [
                        known[value].axes[at_axis[value]]
                        if value in at_axis
                        else np.full(out[axis].n, known[value].everything)
                        for value in inputs
                    ]
                )
            )
        everything = bool(combine([np.array([known[value].everything]) for value in inputs])[0])
        return [Zeros.of(masks, everything=everything)]

    return zeros


_all_zero = _combined(np.logical_and.reduce, slice(None))
_any_zero = _combined(np.logical_or.reduce, slice(None))
_first_zero = _combined(np.logical_and.reduce, slice(1))
_branches_zero = _combined(np.logical_and.reduce, slice(1, 3))
_agree_elementwise = _tie_aligned(slice(None))
_agree_first = _tie_aligned(slice(1))


def _zeros_clip(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    """0 stays 0 if it lies between the bounds."""
    low, high = (constant_of(bound) if bound is not None else None for bound in (*node.inputs[1:3], None, None)[:2])
    for given, tensor, fits in zip(node.inputs[1:3], (low, high), (np.less_equal, np.greater_equal), strict=False):
        if given is not None and (tensor is None or not fits(tensor.numpy(), 0).all()):
            return None
    return _first_zero(channels, node)


# Operators that treat some axes as a whole and leave the others alone.


def _whole_axes(which: Callable[[Channels, ir.Node, int], Sequence[int] | None], why: str) -> AgreeRule:
    """Axes of the same number run through, but for those that the operator works along."""

    def agree(channels: Channels, node: ir.Node) -> None:
        shape = channels.shape(node.inputs[0])
        whole = which(channels, node, len(shape)) if shape is not None else None
        if shape is None or whole is None:
            _keep_all(channels, node, "its axes are unknown")
            return
        for value in node.inputs[1:]:
            channels.keep(value, node, why)
        for axis in range(len(shape)):
            for out in node.outputs:
                if axis in whole:
                    channels.keep(out, node, why, axes=_existing(channels, out, axis))
                elif len(channels.shape(out) or ()) == len(shape):
                    channels.tie([(_value(node, 0), axis), (out, axis)], node)
                else:
                    channels.keep(out, node, "its shape is unknown")
            if axis in whole:
                channels.keep(node.inputs[0], node, why, axes=[axis])

    return agree


def _zeros_beside(which: Callable[[Channels, ir.Node, int], Sequence[int] | None]) -> ZerosRule:
    """For operators that make zeros of zeros: what is zero beside the axes that they work along stays zero."""

    def zeros(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
        shape, out = channels.shape(node.inputs[0]), channels.shape(node.outputs[0])
        whole = which(channels, node, len(shape)) if shape is not None else None
        if whole is None or out is None:
            return None
        known = channels.zero(_value(node, 0))
        masks = [np.zeros_like(mask) if axis in whole else mask for axis, mask in enumerate(known.axes)]
        return [
            Zeros.of([m if m.size == a.n else np.zeros(a.n, dtype=np.bool_) for m, a in zip(masks, out, strict=True)])
        ]

    return zeros


def _existing(channels: Channels, value: ir.Value, axis: int) -> list[int]:
    return [axis] if axis < len(channels.shape(value) or ()) else []


def _value(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _one_axis(default: int) -> Callable[[Channels, ir.Node, int], Sequence[int]]:
    return lambda _channels, node, rank: [number_of(node, "axis", default) % rank]


def _from_axis(_channels: Channels, node: ir.Node, rank: int) -> Sequence[int]:
    return range(number_of(node, "axis", -1) % rank, rank)


def _beside_heads(_channels: Channels, _node: ir.Node, rank: int) -> Sequence[int]:
    return [0, 2, 3] if rank == 4 else range(rank)


def _spatial(_channels: Channels, node: ir.Node, rank: int) -> Sequence[int]:
    return range(2, rank) if len(node.outputs) == 1 else range(rank)


def _last_two(_channels: Channels, _node: ir.Node, rank: int) -> Sequence[int]:
    return [rank - 2, rank - 1]


# Reductions.


def _agree_reduce(sums: bool) -> AgreeRule:
    """A sum can spare channels that are zero; a mean or a maximum over fewer channels would be another one."""

    def agree(channels: Channels, node: ir.Node) -> None:
        value, out = _value(node, 0), node.outputs[0]
        shape, out_shape = channels.shape(value), channels.shape(out)
        through = _not_reduced(channels, node)
        if shape is None or out_shape is None or through is None or len(out_shape) <= max(through.values(), default=-1):
            _keep_all(channels, node, "its axes are unknown")
            return
        for axis in range(len(shape)):
            if axis in through:
                channels.tie([(value, axis), (out, through[axis])], node)
            elif sums:
                channels.tie([(value, axis)], node, limit=channels.zero(value).axes[axis])
            else:
                channels.keep(value, node, "it reduces over this axis", axes=[axis])

    return agree


def _not_reduced(channels: Channels, node: ir.Node) -> dict[int, int] | None:
    """Axes of the input that a reduction leaves -> axes of its output; None if they are not known."""
    shape = channels.shape(node.inputs[0])
    axes = axes_of(channels.table, node, len(shape)) if shape is not None else None
    if shape is None or axes is None:
        return None
    explicit = "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)
    if not (explicit and axes):
        axes = [] if number_of(node, "noop_with_empty_axes", 0) else list(range(len(shape)))
    left = [axis for axis in range(len(shape)) if axis not in axes]
    keeps_axes = bool(number_of(node, "keepdims", 1))
    return {axis: axis if keeps_axes else at for at, axis in enumerate(left)}


def _zeros_reduce(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    """Zeros have the sum and the mean 0 (nothing at all has the product 1)."""
    through, out = _not_reduced(channels, node), channels.shape(node.outputs[0])
    if through is None or out is None or len(out) <= max(through.values(), default=-1):
        return None
    zeros = channels.zero(_value(node, 0))
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in out]
    for axis, at in through.items():
        masks[at] = zeros.axes[axis]
    return [Zeros.of(masks, everything=zeros.everything)]


# Matrix products.


def _agree_matmul(channels: Channels, node: ir.Node) -> None:
    first, second, out = _value(node, 0), _value(node, 1), node.outputs[0]
    a, b, c = channels.shape(first), channels.shape(second), channels.shape(out)
    if a is None or b is None or c is None or min(len(a), len(b)) < 2 or a[-1] != b[-2]:
        _keep_all(channels, node, "its shapes do not tell what it contracts")
        return
    for axis in range(len(c) - 2):
        cells: list[Cell] = [(out, axis)]
        for value, shape in ((first, a), (second, b)):
            at = axis - (len(c) - len(shape))
            if at >= 0 and shape[at] != ONE:
                cells.append((value, at))
        channels.tie(cells, node)
    channels.tie([(first, len(a) - 2), (out, len(c) - 2)], node)
    channels.tie([(second, len(b) - 1), (out, len(c) - 1)], node)
    contracted = channels.zero(first).axes[-1] | channels.zero(second).axes[-2]
    channels.tie([(first, len(a) - 1), (second, len(b) - 2)], node, limit=contracted)


def _zeros_matmul(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    first, second, out = node.inputs[0], node.inputs[1], channels.shape(node.outputs[0])
    a, b = channels.shape(first), channels.shape(second)
    if first is None or second is None or a is None or b is None or out is None or min(len(a), len(b)) < 2:
        return None
    left, right = channels.zero(first), channels.zero(second)
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in out]
    for zeros, contracted in ((left, len(a) - 1), (right, len(b) - 2)):
        for axis, mask in enumerate(zeros.axes):
            at = axis + len(out) - len(zeros.axes)
            if axis != contracted and mask.size == masks[at].size:
                masks[at] |= mask
    fits = left.axes[-1].shape == right.axes[-2].shape
    return [Zeros.of(masks, everything=fits and bool((left.axes[-1] | right.axes[-2]).all()))]


def _agree_gemm(channels: Channels, node: ir.Node) -> None:
    """alpha * A' B' + beta * C, transposed by transA and transB."""
    first, second, out = _value(node, 0), _value(node, 1), node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    a, b, c = channels.shape(first), channels.shape(second), channels.shape(bias)
    m, k = (1, 0) if number_of(node, "transA", 0) else (0, 1)
    k_second, n = (1, 0) if number_of(node, "transB", 0) else (0, 1)
    unknown = a is None or b is None or channels.shape(out) is None or (bias is not None and c is None)
    if a is None or b is None or unknown or a[k] != b[k_second]:
        _keep_all(channels, node, "its shapes do not tell what it contracts")
        return
    channels.tie([(first, m), (out, 0)], node)
    channels.tie([(second, n), (out, 1)], node)
    contracted = channels.zero(first).axes[k] | channels.zero(second).axes[k_second]
    channels.tie([(first, k), (second, k_second)], node, limit=contracted)
    for axis, length in enumerate(c or ()):
        if bias is not None and length != ONE:
            channels.tie([(bias, axis), (out, axis + 2 - len(c or ()))], node)


def _zeros_gemm(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None or channels.shape(first) is None or channels.shape(second) is None:
        return None
    m, k = (1, 0) if number_of(node, "transA", 0) else (0, 1)
    k_second, n = (1, 0) if number_of(node, "transB", 0) else (0, 1)
    left, right = channels.zero(first), channels.zero(second)
    rows, columns = left.axes[m], right.axes[n]
    fits = left.axes[k].shape == right.axes[k_second].shape
    everything = fits and bool((left.axes[k] | right.axes[k_second]).all())
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        if (shape := channels.shape(bias)) is None:
            return None
        added = channels.zero(bias)
        everything = everything and added.everything
        rows = rows & added.everything
        columns = columns & (added.axes[-1] if shape and shape[-1].n == columns.size else added.everything)
    return [Zeros.of([rows, columns], everything=everything)]


# Attention (opset 23): query (batch, heads, sequence, head_dim), key and value with as many or fewer heads.


def _agree_attention(channels: Channels, node: ir.Node) -> None:
    query, key, value, out = _value(node, 0), _value(node, 1), _value(node, 2), node.outputs[0]
    shapes = [channels.shape(v) for v in (query, key, value, out)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        _keep_all(channels, node, "only heads on an axis of their own are understood")
        return
    if any(extra is not None for extra in (*node.inputs[4:], *node.outputs[1:])):
        _keep_all(channels, node, "heads of caches are not understood")
        return
    for tensor in (query, key, value, out):
        channels.keep(tensor, node, "attention works along the sequence", axes=[0, 2])
    channels.keep(query, node, "the head dimension scales the scores", axes=[3])
    channels.keep(key, node, "the head dimension scales the scores", axes=[3])
    channels.tie([(value, 3), (out, 3)], node)
    heads, groups = channels.cut(query, 1).size, channels.cut(key, 1).size
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    mask_heads = (channels.shape(mask) or (None,) * 3)[-3:-2] if mask is not None else ()
    if heads % groups or mask_heads not in ((), (ONE,)):
        for tensor in (query, key, value, out):
            channels.keep(tensor, node, "its mask has heads of its own", axes=[1])
        return
    per_group = heads // groups
    both = (channels.cut(query, 1) & channels.cut(out, 1)).reshape(groups, per_group)
    whole = np.asarray(both.all(axis=1))
    channels.tie([(key, 1), (value, 1)], node, limit=whole, why="a query head of the group has to stay")
    group_cut = np.repeat(channels.cut(key, 1), per_group)
    channels.tie([(query, 1), (out, 1)], node, limit=group_cut, why="another head of its group has to stay")


def _zeros_attention(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value, out = node.inputs[2], channels.shape(node.outputs[0])
    shape = channels.shape(value)
    if value is None or shape is None or out is None or len(shape) != 4 or len(node.outputs) > 1 or len(out) != 4:
        return None
    zeros = channels.zero(value)
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in out]
    masks[1] = np.repeat(zeros.axes[1], out[1].n // shape[1].n)
    masks[3] = zeros.axes[3]
    return [Zeros.of(masks, everything=zeros.everything)]


# Convolutions: data (batch, channels, ...), weight (out channels, channels / group, ...).


def _is_depthwise(channels: Channels, node: ir.Node) -> bool:
    """Whether every channel has a filter of its own."""
    data, weight, group = channels.shape(node.inputs[0]), channels.shape(node.inputs[1]), number_of(node, "group", 1)
    return bool(data and weight) and group > 1 and Axis((), group) == (data or ())[1] == (weight or ())[0]


def _agree_conv(channels: Channels, node: ir.Node) -> None:
    value, weight, out = _value(node, 0), _value(node, 1), node.outputs[0]
    a, b, c = (channels.shape(tensor) for tensor in (value, weight, out))
    if a is None or b is None or c is None or len({len(a), len(b), len(c)}) > 1:
        _keep_all(channels, node, "its shapes are unknown")
        return
    for tensor in (value, weight, out):
        channels.keep(tensor, node, "it slides along this axis", axes=range(2, len(a)))
    channels.tie([(value, 0), (out, 0)], node)
    made: list[Cell] = [(out, 1), (weight, 0), *((bias, 0) for bias in node.inputs[2:3] if bias is not None)]
    if _is_depthwise(channels, node):
        channels.tie([(value, 1), *made], node)
    elif number_of(node, "group", 1) == 1 and a[1] == b[1]:
        channels.tie(made, node)
        contracted = channels.zero(value).axes[1] | channels.zero(weight).axes[1]
        channels.tie([(value, 1), (weight, 1)], node, limit=contracted)
    else:
        for tensor, axis in ((value, 1), (weight, 1), *made):
            channels.keep(tensor, node, "it has groups of several channels", axes=[axis])


def _zeros_conv(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value, weight, out = _value(node, 0), _value(node, 1), channels.shape(node.outputs[0])
    if channels.shape(value) is None or channels.shape(weight) is None or out is None:
        return None
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in out]
    masks[1] = channels.zero(weight).axes[0].copy()
    if _is_depthwise(channels, node):
        masks[1] |= channels.zero(value).axes[1]
    for bias in node.inputs[2:3]:
        if bias is not None:
            masks[1] &= channels.zero(bias).axes[0] if channels.shape(bias) is not None else False
    return [Zeros.of(masks)]


def _rewrite_conv(channels: Channels, node: ir.Node) -> None:
    if _is_depthwise(channels, node):
        node.attributes["group"] = ir.AttrInt64("group", int((~channels.cut(node.outputs[0], 1)).sum()))


def _agree_batch_norm(channels: Channels, node: ir.Node) -> None:
    value, out = _value(node, 0), node.outputs[0]
    shape = channels.shape(value)
    if shape is None or channels.shape(out) is None or len(node.outputs) > 1:
        _keep_all(channels, node, "it is training, or its shapes are unknown")
        return
    for axis in range(len(shape)):
        statistics: list[Cell] = [(_value(node, i), 0) for i in range(1, 5)] if axis == 1 else []
        channels.tie([(value, axis), (out, axis), *statistics], node)


# Operators that move channels.


def _agree_transpose(channels: Channels, node: ir.Node) -> None:
    shape = channels.shape(node.inputs[0])
    if shape is None:
        _keep_all(channels, node, "its shape is unknown")
        return
    for at, axis in enumerate(permutation(node, len(shape))):
        channels.tie([(_value(node, 0), axis), (node.outputs[0], at)], node)


def _zeros_transpose(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value = _value(node, 0)
    shape = channels.shape(value)
    if shape is None:
        return None
    zeros = channels.zero(value)
    return [Zeros(tuple(zeros.axes[axis] for axis in permutation(node, len(shape))), zeros.everything)]


def _agree_reshape(channels: Channels, node: ir.Node) -> None:
    value, out = _value(node, 0), node.outputs[0]
    first, second = channels.shape(value), channels.shape(out)
    groups = match_axes(first, second) if first is not None and second is not None else None
    if first is None or second is None or groups is None:
        _keep_all(channels, node, "its target shape is unknown")
        return
    if node.op_type == "Reshape" and _cannot_say(channels, node, first, second):
        return
    for group in groups:
        ours, theirs = _group_grids(first, second, group.first, group.second)
        if ours is None or theirs is None:
            for tensor, axes in ((value, group.first), (out, group.second)):
                channels.keep(tensor, node, "it mixes dynamic and static axes", axes=axes)
            continue
        common = to_grid([channels.cut(value, a) for a in group.first], ours)
        common &= to_grid([channels.cut(out, a) for a in group.second], theirs)
        for tensor, axes, shape in ((value, group.first, ours), (out, group.second, theirs)):
            for axis, mask in zip(axes, from_grid(common, shape), strict=True):
                channels.tie([(tensor, axis)], node, limit=mask, why="it regroups channels of which some have to stay")


def _group_grids(
    first: Shape, second: Shape, ours: range, theirs: range
) -> tuple[tuple[int, ...], tuple[int, ...]] | tuple[None, None]:
    left, right = grid_shape(first[ours.start : ours.stop]), grid_shape(second[theirs.start : theirs.stop])
    if left is None or right is None or np.prod(left, dtype=int) != np.prod(right, dtype=int):
        return None, None
    return left, right


def _zeros_reshape(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value = _value(node, 0)
    first, second = channels.shape(value), channels.shape(node.outputs[0])
    groups = match_axes(first, second) if first is not None and second is not None else None
    if first is None or second is None or groups is None:
        return None
    zeros = channels.zero(value)
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in second]
    for group in groups:
        ours, theirs = _group_grids(first, second, group.first, group.second)
        if ours is not None and theirs is not None:
            grid = to_grid([zeros.axes[a] for a in group.first], ours)
            for axis, mask in zip(group.second, from_grid(grid, theirs), strict=True):
                masks[axis] = mask
    return [Zeros.of(masks, everything=zeros.everything)]


def _remaining(channels: Channels, value: ir.Value) -> Shape:
    """The shape of `value` once its channels are cut."""
    shape = channels.shape(value)
    assert shape is not None
    return tuple(Axis(axis.outer, int((~channels.cut(value, i)).sum())) for i, axis in enumerate(shape))


def _cannot_say(channels: Channels, node: ir.Node, source: Shape, target: Shape) -> bool:
    """Keeps all channels of a node whose target shape could not be written anew."""
    if plan_target_shape(node, source, target, channels.table) is not None:
        return False
    _keep_all(channels, node, "the lengths of its dynamic axes are nowhere to be read")
    return True


def _rewrite_target_shape(channels: Channels, node: ir.Node) -> None:
    value, out = _value(node, 0), node.outputs[0]
    if any(channels.cut(out, axis).any() for axis in range(len(channels.shape(out) or ()))):
        pieces = plan_target_shape(node, _remaining(channels, value), _remaining(channels, out), channels.table)
        assert pieces is not None, "agree has asked"
        set_target_shape(node, pieces, channels.table)


def _agree_expand(channels: Channels, node: ir.Node) -> None:
    value, out = _value(node, 0), node.outputs[0]
    own, wide = channels.shape(value), channels.shape(out)
    if own is None or wide is None:
        _keep_all(channels, node, "its target shape is unknown")
        return
    if _cannot_say(channels, node, own, wide):
        return
    for axis, length in enumerate(own):
        at = axis + len(wide) - len(own)
        if length != ONE:
            channels.tie([(value, axis), (out, at)], node)


_zeros_expand = _combined(np.logical_and.reduce, slice(1))


def _agree_unsqueeze(channels: Channels, node: ir.Node) -> None:
    value, out = _value(node, 0), node.outputs[0]
    pairs = _through(channels, value, out)
    if pairs is None:
        _keep_all(channels, node, "its axes cannot be told to fit")
        return
    for axis, at in pairs:
        channels.tie([(value, axis), (out, at)], node)


def _zeros_unsqueeze(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value, out = _value(node, 0), node.outputs[0]
    pairs, wide = _through(channels, value, out), channels.shape(out)
    if pairs is None or wide is None:
        return None
    zeros = channels.zero(value)
    masks = [np.zeros(axis.n, dtype=np.bool_) for axis in wide]
    for axis, at in pairs:
        masks[at] = zeros.axes[axis]
    return [Zeros.of(masks, everything=zeros.everything)]


def _through(channels: Channels, value: ir.Value, out: ir.Value) -> list[tuple[int, int]] | None:
    """Axes other than those of length 1, in order: Squeeze and Unsqueeze add and drop only such."""
    own, other = channels.shape(value), channels.shape(out)
    if own is None or other is None:
        return None
    first = [i for i, axis in enumerate(own) if axis != ONE]
    second = [i for i, axis in enumerate(other) if axis != ONE]
    return list(zip(first, second, strict=True)) if len(first) == len(second) else None


def _pieces(channels: Channels, whole: ir.Value, parts: Sequence[ir.Value], axis: int) -> list[slice] | None:
    """Where each part lies along `axis` of the whole."""
    shapes = [channels.shape(part) for part in parts]
    total = channels.shape(whole)
    if total is None or total[axis].outer or any(s is None or s[axis].outer for s in shapes):
        return None
    ends = np.cumsum([s[axis].n for s in shapes if s is not None]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _agree_pieces(
    channels: Channels, node: ir.Node, whole: ir.Value, parts: Sequence[ir.Value], default_axis: int | None
) -> None:
    shape = channels.shape(whole)
    if shape is None or any(channels.shape(part) is None for part in parts):
        _keep_all(channels, node, "its shapes are unknown")
        return
    axis = number_of(node, "axis", default_axis or 0) % len(shape)
    for other in range(len(shape)):
        if other != axis:
            channels.tie([(whole, other), *((part, other) for part in parts)], node)
    pieces = _pieces(channels, whole, parts, axis)
    if pieces is None:
        for tensor in (whole, *parts):
            channels.keep(tensor, node, "it joins or splits a dynamic axis", axes=[axis])
        return
    mask, reasons = channels.cut(whole, axis).copy(), channels.reasons((whole, axis)).copy()
    for part, piece in zip(parts, pieces, strict=True):
        lost = mask[piece] & ~channels.cut(part, axis)
        reasons[piece][lost] = channels.reasons((part, axis))[lost]
        mask[piece] &= ~lost
    channels.shrink((whole, axis), mask, reasons)
    for part, piece in zip(parts, pieces, strict=True):
        channels.shrink((part, axis), mask[piece], reasons[piece])


def _agree_concat(channels: Channels, node: ir.Node) -> None:
    parts = [value for value in node.inputs if value is not None]
    _agree_pieces(channels, node, node.outputs[0], parts, None)


def _agree_split(channels: Channels, node: ir.Node) -> None:
    _agree_pieces(channels, node, _value(node, 0), node.outputs, 0)


def _zeros_concat(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    out = node.outputs[0]
    parts = [value for value in node.inputs if value is not None]
    shape = channels.shape(out)
    if shape is None or any(channels.shape(part) is None for part in parts):
        return None
    axis = number_of(node, "axis", 0) % len(shape)
    zeros = [channels.zero(part) for part in parts]
    masks = [np.zeros(length.n, dtype=np.bool_) for length in shape]
    for other, mask in enumerate(masks):
        if other != axis and all(z.axes[other].size == mask.size for z in zeros):
            masks[other] = np.logical_and.reduce([z.axes[other] for z in zeros])
    if _pieces(channels, out, parts, axis):
        masks[axis] = np.concatenate([z.axes[axis] for z in zeros])
    return [Zeros.of(masks, everything=all(z.everything for z in zeros))]


def _zeros_split(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value = _value(node, 0)
    shape = channels.shape(value)
    if shape is None or any(channels.shape(part) is None for part in node.outputs):
        return None
    axis = number_of(node, "axis", 0) % len(shape)
    pieces = _pieces(channels, value, node.outputs, axis)
    zeros = channels.zero(value)
    if pieces is None:
        return None
    return [
        Zeros.of([m[piece] if a == axis else m for a, m in enumerate(zeros.axes)], everything=zeros.everything)
        for piece in pieces
    ]


def _rewrite_split(channels: Channels, node: ir.Node) -> None:
    shape = channels.shape(_value(node, 0))
    assert shape is not None
    axis = number_of(node, "axis", 0) % len(shape)
    if channels.cut(_value(node, 0), axis).any():
        set_integers(node, 1, [int((~channels.cut(part, axis)).sum()) for part in node.outputs])
        node.attributes.pop("num_outputs", None)


def _window(channels: Channels, node: ir.Node) -> dict[int, npt.NDArray[np.intp]] | None:
    """Per axis that a Slice cuts the channels that it takes; None unless bounds are constant and steps are 1.

    Nothing is known of the channels taken from a dynamic axis: there are none.
    """
    shape = channels.shape(node.inputs[0])
    starts, ends = channels.table.integers(node.inputs[1]), channels.table.integers(node.inputs[2])
    has_steps = len(node.inputs) > 4 and node.inputs[4] is not None
    steps = channels.table.integers(node.inputs[4]) if has_steps else []
    axes = axes_of(channels.table, node, len(shape), index=3) if shape is not None else None
    if shape is None or axes is None or starts is None or ends is None or steps is None:
        return None
    if any(step != 1 for step in steps):
        return None
    return {
        axis: np.arange(0 if shape[axis].outer else shape[axis].n)[slice(start, end)]
        for axis, start, end in zip(axes, starts, ends, strict=False)
    }


def _agree_slice(channels: Channels, node: ir.Node) -> None:
    value, out = _value(node, 0), node.outputs[0]
    shape, window = channels.shape(value), _window(channels, node)
    if shape is None or window is None or channels.shape(out) is None:
        _keep_all(channels, node, "its bounds are not constant, or its steps are not 1")
        return
    for axis, length in enumerate(shape):
        taken = window.get(axis)
        if taken is not None and (length.outer or taken.size != channels.cut(out, axis).size):
            for tensor in (value, out):
                channels.keep(tensor, node, "it takes a part of a dynamic axis", axes=[axis])
        elif taken is not None:
            # Channels outside of the window are not asked for: they may go.
            mask, reasons = np.ones(length.n, dtype=np.bool_), np.full(length.n, None, dtype=np.object_)
            mask[taken], reasons[taken] = channels.cut(out, axis), channels.reasons((out, axis))
            channels.shrink((value, axis), mask, reasons)
            channels.shrink((out, axis), channels.cut(value, axis)[taken], channels.reasons((value, axis))[taken])
        else:
            channels.tie([(value, axis), (out, axis)], node)


def _zeros_slice(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    value, out = _value(node, 0), channels.shape(node.outputs[0])
    window = _window(channels, node)
    if window is None or out is None:
        return None
    zeros = channels.zero(value)
    if len(zeros.axes) != len(out):
        return None
    masks = [mask[window[axis]] if axis in window else mask for axis, mask in enumerate(zeros.axes)]
    # Nothing is known of a part of a dynamic axis.
    masks = [m if m.size == axis.n else np.zeros(axis.n, dtype=np.bool_) for m, axis in zip(masks, out, strict=True)]
    return [Zeros.of(masks, everything=zeros.everything)]


def _rewrite_slice(channels: Channels, node: ir.Node) -> None:
    value, window = _value(node, 0), _window(channels, node)
    shape = channels.shape(value)
    if window is None or shape is None or not any(channels.cut(value, axis).any() for axis in window):
        return
    axes = axes_of(channels.table, node, len(shape), index=3) or []
    starts, ends = channels.table.integers(node.inputs[1]) or [], channels.table.integers(node.inputs[2]) or []
    for at, axis in enumerate(axes):
        if axis in window and not shape[axis].outer:
            kept = np.flatnonzero(~channels.cut(value, axis))
            inside = np.flatnonzero(np.isin(kept, window[axis]))
            starts[at], ends[at] = (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, 0)
    set_integers(node, 1, starts)
    set_integers(node, 2, ends)


def _agree_gather(channels: Channels, node: ir.Node) -> None:
    data, indices, out = _value(node, 0), node.inputs[1], node.outputs[0]
    shape, index_shape = channels.shape(data), channels.shape(indices)
    if shape is None or index_shape is None or channels.shape(out) is None:
        _keep_all(channels, node, "its shapes are unknown")
        return
    axis = number_of(node, "axis", 0) % len(shape)
    for other in range(len(shape)):
        if other != axis:
            at = other if other < axis else other + len(index_shape) - 1
            channels.tie([(data, other), (out, at)], node)
    chosen = _chosen(channels, node)
    if chosen is None or chosen.ndim != 1:
        for at in range(axis, axis + len(index_shape)):
            channels.keep(out, node, "it picks every index", axes=[at])
    if chosen is None:
        channels.keep(data, node, "any of its rows may be asked for", axes=[axis])
        return
    if chosen.ndim == 1:
        chosen = chosen[~channels.cut(out, axis)]  # an index whose result nobody needs is not asked for
    mask = np.ones(shape[axis].n, dtype=np.bool_)
    mask[chosen] = False
    channels.tie([(data, axis)], node, limit=mask, why="it picks this row")


def _chosen(channels: Channels, node: ir.Node) -> npt.NDArray[np.intp] | None:
    """The rows that a Gather picks, counted from 0; None if they depend on the input."""
    indices, shape = _value(node, 1), channels.shape(node.inputs[0])
    tensor, axis = constant_of(indices), number_of(node, "axis", 0)
    numbers = channels.table.integers(indices)
    if tensor is not None:
        picked = np.asarray(tensor.numpy(), dtype=np.intp)
    elif numbers is not None:
        picked = np.asarray(numbers, dtype=np.intp).reshape((-1,) * len(channels.shape(indices) or ()))
    else:
        return None
    return None if shape is None or shape[axis].outer or not shape[axis].n else picked % shape[axis].n


def _zeros_gather(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    data, indices, out = _value(node, 0), node.inputs[1], channels.shape(node.outputs[0])
    shape, index_shape = channels.shape(data), channels.shape(indices)
    if shape is None or index_shape is None or out is None:
        return None
    axis = number_of(node, "axis", 0) % len(shape)
    zeros = channels.zero(data)
    chosen = _chosen(channels, node)
    if chosen is not None and chosen.ndim == 1:
        picked = [zeros.axes[axis][chosen]]
    else:
        picked = [np.zeros(a.n, dtype=np.bool_) for a in index_shape]
    masks = [*zeros.axes[:axis], *picked, *zeros.axes[axis + 1 :]]
    return [Zeros.of(masks, everything=zeros.everything)]


def _rewrite_gather(channels: Channels, node: ir.Node) -> None:
    data, out, chosen = _value(node, 0), node.outputs[0], _chosen(channels, node)
    shape = channels.shape(data)
    if shape is None or chosen is None:
        return
    axis = number_of(node, "axis", 0) % len(shape)
    asked = chosen[~channels.cut(out, axis)] if chosen.ndim == 1 else chosen
    position = np.cumsum(~channels.cut(data, axis)) - 1
    if asked.size < chosen.size or np.any(position[asked] != asked):
        set_integers(node, 1, position[asked])


def _agree_shape(channels: Channels, node: ir.Node) -> None:
    """Lengths of dynamic axes stay; a static one that is asked for has to stay as well."""
    shape = channels.shape(node.inputs[0])
    rank = len(shape or ())
    start, end = number_of(node, "start", 0), number_of(node, "end", rank)
    asked = range(rank)[start:end]
    channels.keep(node.inputs[0], node, "its length is asked for", axes=asked)
    channels.keep(node.outputs[0], node, "it holds lengths")


_UNARY_ZERO = Rule(_agree_elementwise, _first_zero)
_UNARY = Rule(_agree_elementwise)
_OVER_AXIS = "it works along this axis"
_OTHER_NORM = "a norm over fewer channels is another norm"

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(ZERO_AT_ZERO, _UNARY_ZERO),
        **dict.fromkeys(NOT_ZERO_AT_ZERO, _UNARY),
        **dict.fromkeys(["Add", "Sub", "Sum", "Max", "Min", "Mean"], Rule(_agree_elementwise, _all_zero, data=2**10)),
        "Mul": Rule(_agree_elementwise, _any_zero, data=2),
        "And": Rule(_agree_elementwise, _any_zero, data=2),
        **dict.fromkeys(("Div", "Mod", "PRelu"), Rule(_agree_elementwise, _first_zero, data=2)),
        "CastLike": Rule(_agree_first, _first_zero),
        "Clip": Rule(_agree_first, _zeros_clip),
        **dict.fromkeys(
            ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Or", "Pow", "Xor"],
            Rule(_agree_elementwise, data=2),
        ),
        "Where": Rule(_agree_elementwise, _branches_zero, data=3),
        "MatMul": Rule(_agree_matmul, _zeros_matmul, data=2),
        "Gemm": Rule(_agree_gemm, _zeros_gemm, data=3),
        "Attention": Rule(_agree_attention, _zeros_attention, data=3),
        **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), Rule(_whole_axes(_one_axis(-1), _OVER_AXIS), data=1)),
        "LayerNormalization": Rule(_whole_axes(_from_axis, _OTHER_NORM), data=3),
        "RMSNormalization": Rule(_whole_axes(_from_axis, _OTHER_NORM), _zeros_beside(_from_axis), data=2),
        "RotaryEmbedding": Rule(_whole_axes(_beside_heads, "it rotates along this axis"), _zeros_beside(_beside_heads)),
        "Trilu": Rule(_whole_axes(_last_two, _OVER_AXIS), _first_zero),
        "Conv": Rule(_agree_conv, _zeros_conv, _rewrite_conv, data=3),
        "BatchNormalization": Rule(_agree_batch_norm, data=5),
        **dict.fromkeys(
            ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"),
            Rule(_whole_axes(_spatial, "it slides along this axis"), _zeros_beside(_spatial)),
        ),
        **dict.fromkeys(
            ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"), Rule(_agree_reduce(sums=True), _zeros_reduce)
        ),
        **dict.fromkeys(("ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp"), Rule(_agree_reduce(sums=False))),
        "ReduceMean": Rule(_agree_reduce(sums=False), _zeros_reduce),
        "Transpose": Rule(_agree_transpose, _zeros_transpose),
        "Reshape": Rule(_agree_reshape, _zeros_reshape, _rewrite_target_shape),
        "Flatten": Rule(_agree_reshape, _zeros_reshape),
        "Expand": Rule(_agree_expand, _zeros_expand, _rewrite_target_shape),
        "Unsqueeze": Rule(_agree_unsqueeze, _zeros_unsqueeze),
        "Squeeze": Rule(_agree_unsqueeze, _zeros_unsqueeze),
        "Concat": Rule(_agree_concat, _zeros_concat, data=2**10),
        "Split": Rule(_agree_split, _zeros_split, _rewrite_split),
        "Slice": Rule(_agree_slice, _zeros_slice, _rewrite_slice),
        "Gather": Rule(_agree_gather, _zeros_gather, _rewrite_gather),
        "Shape": Rule(_agree_shape),
    }
)
"""Operator -> rule."""

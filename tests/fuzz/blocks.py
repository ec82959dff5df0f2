"""Blocks of random graphs: each adds some nodes to what it is given and returns the values that others may read.

A block draws what it likes. What ONNX Runtime refuses raises `RejectedError`, and the graph goes on without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from onnx import TensorProto

from tests.fuzz.random_graphs import LAST, Block, RejectedError, Writer

SMOOTH = ("Tanh", "Sigmoid", "Softplus", "Softsign", "Erf", "Atan", "Sin", "Cos", "Elu", "Selu")
EXACT = ("Relu", "LeakyRelu", "Neg", "Abs", "HardSigmoid", "HardSwish", "Identity", "ThresholdedRelu", "Sign", "Ceil")
REDUCTIONS = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare")
FLOATS = TensorProto.FLOAT


def _rank(g: Writer, x: str, *ranks: int) -> tuple[int, ...]:
    shape = g.shape(x)
    if len(shape) not in ranks:
        raise RejectedError("rank")
    return shape


def _divisor(g: Writer, number: int) -> int:
    return int(g.pick([each for each in range(1, number + 1) if number % each == 0]))


def _axes(g: Writer, kind: str, x: str, *axes: int, since: int = 18, **attributes: int) -> str:
    """An operator whose axes became an input in opset `since`."""
    if g.opset >= since:
        return str(g.op(kind, x, g.ints(*axes), **attributes))
    return str(g.op(kind, x, axes=list(axes), **attributes))


# --- elementwise


def activation(g: Writer, x: str) -> str:
    return str(g.op(g.pick(SMOOTH + EXACT + (("Gelu",) if g.opset >= 20 else ())), x))


def gate(g: Writer, x: str) -> str:
    return g.gate(x, g.axis(x))


def prelu(g: Writer, x: str) -> str:
    shape = g.shape(x)
    return str(g.op("PRelu", x, g.weight(*(shape[1:2] + (1,) * (len(shape) - 2)))))


def clip(g: Writer, x: str) -> str:
    low, high = g.const(np.float32(g.pick([-1, 0, -0.3]))), g.const(np.float32(g.pick([0.5, 1, 6])))
    bounds: list[str] = [[low, high], [low], ["", high]][g.number(0, 2)]
    return str(g.op("Clip", x, *bounds))


def binary(g: Writer, x: str) -> str:
    other = g.pick(g.pool)
    if g.chance(0.2):
        other = g.op("Exp", g.op("Tanh", other))
        return str(g.op(g.pick(["Div", "Mul", "Pow"]), g.op("Abs", x), other))
    return str(
        g.op(g.pick(["Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean"]), *g.rng.permutation([x, other]).tolist())
    )


def bias(g: Writer, x: str) -> str:
    shape = g.shape(x)
    axis = g.axis(x) % len(shape)
    wide = [1] * (len(shape) - axis)
    wide[0] = shape[axis]
    return str(g.op(g.pick(["Add", "Sub", "Mul"]), *g.rng.permutation([x, g.weight(*wide)]).tolist()))


def constants(g: Writer, x: str) -> str:
    """Arithmetic of constants alone, which folds."""
    length = g.shape(x)[-1]
    scale = g.op(g.pick(["Add", "Mul", "Sub"]), g.weight(length, zero=[0]), g.weight(length, zero=[0]))
    if g.chance(0.4):
        scale = g.op("Mul", scale, g.op("Cast", g.const(g.rng.integers(0, 2, length)), to=FLOATS))
    return str(g.op(g.pick(["Mul", "Add"]), x, scale))


def cast(g: Writer, x: str) -> str:
    to = g.pick([TensorProto.INT64, TensorProto.INT32, TensorProto.INT8, TensorProto.DOUBLE, TensorProto.BOOL])
    return str(g.op("Cast", g.op("Cast", g.op("Floor", x) if g.chance(0.5) else x, to=to), to=FLOATS))


def compare(g: Writer, x: str) -> str:
    condition = g.op(g.pick(["Greater", "Less", "GreaterOrEqual", "LessOrEqual"]), x, g.const(np.float32(0.1)))
    if g.chance(0.3):
        condition = g.op("Not", condition)
    return str(g.op("Where", condition, *g.rng.permutation([x, g.gate(x, g.axis(x))]).tolist()))


# --- products


def linear(g: Writer, x: str) -> str:
    width, out = g.shape(x)[-1], g.number(1, 16)
    transposed = g.chance(0.3)
    weight = g.weight(*((out, width) if transposed else (width, out)), zero=[0, 1])
    weight = g.op("Transpose", weight, perm=[1, 0]) if transposed else weight
    y = g.op("MatMul", x, weight)
    return str(g.op("Add", y, g.weight(out, zero=[0]))) if g.chance(0.5) else str(y)


def gemm(g: Writer, x: str) -> str:
    shape = g.shape(x)
    flat = g.op("Flatten", x, axis=g.spelled(1, len(shape))) if len(shape) != 2 or g.chance(0.3) else x
    width, out, turned = g.shape(flat)[1], g.number(1, 12), g.number(0, 1)
    weight = g.weight(*((out, width) if turned else (width, out)), zero=[0, 1])
    extra = [g.weight(out, zero=[0])] if g.chance(0.6) else []
    return str(g.op("Gemm", flat, weight, *extra, transB=turned, alpha=float(g.pick([1, 0.5])), beta=1.0))


def mlp(g: Writer, x: str) -> str:
    """Linear, activation, gate, linear, and mostly the residual."""
    width, hidden = g.shape(x)[-1], g.pick([8, 16, 24])
    h = g.op("MatMul", x, g.weight(width, hidden, zero=[1]))
    h = g.gate(g.op(g.pick(SMOOTH[:4] + EXACT[:5]), h), -1)
    y = g.op("MatMul", h, g.weight(hidden, width, zero=[0]))
    return str(g.op("Add", x, y)) if g.chance(0.7) else str(y)


def glu(g: Writer, x: str) -> str:
    width, hidden = g.shape(x)[-1], g.number(4, 12)
    h = g.op("MatMul", x, g.weight(width, 2 * hidden, zero=[1]))
    more = {"num_outputs": 2} if g.opset >= 18 else {}
    a, b = g.op("Split", h, outputs=2, axis=g.spelled(-1, len(g.shape(h))), **more)
    h = g.gate(g.op("Mul", g.op("Sigmoid", a), b), -1)
    return str(g.op("MatMul", h, g.weight(hidden, width)))


def einsum(g: Writer, x: str) -> str:
    _, _, width = _rank(g, x, 3)
    heads, part = g.number(1, 4), g.number(1, 5)
    h = g.op("Einsum", x, g.weight(heads, width, part, zero=[0, 2]), equation="bsc,hcd->bhsd")
    h = g.gate(h, g.pick([1, 3]))
    return str(g.op("Einsum", h, g.weight(heads, part, width), equation="bhsd,hdc->bsc"))


def heads(g: Writer, x: str) -> str:
    """Attention of single steps, heads split by Reshape."""
    _, _, width = _rank(g, x, 3)
    count, part = g.pick([1, 2, 4, 6]), g.pick([2, 4])
    merged, parts = g.ints(0, 0, count * part), g.ints(0, 0, count, part)
    q, k, v = (
        g.op("Transpose", g.op("Reshape", g.op("MatMul", x, g.weight(width, count * part, zero=[1])), parts), perm=p)
        for p in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    )
    scores = g.op("Softmax", g.op("Mul", g.op("MatMul", q, k), g.const(np.float32(part**-0.5))), axis=g.pick([-1, 3]))
    h = g.op("MatMul", scores, v)
    if g.chance(0.8):
        h = g.gate(h, g.pick([1, 3]))
    h = g.op("Reshape", g.op("Transpose", h, perm=[0, 2, 1, 3]), merged)
    return str(g.op("Add", x, g.op("MatMul", h, g.weight(count * part, width))))


def attention(g: Writer, x: str) -> str:
    _, _, width = _rank(g, x, 3)
    if g.opset < 23:
        raise RejectedError("opset")
    heads_q, heads_kv, part = *g.pick([(2, 2), (4, 2), (4, 4), (6, 3)]), g.pick([2, 4])
    q, k, v = (g.op("MatMul", x, g.weight(width, n * part, zero=[1])) for n in (heads_q, heads_kv, heads_kv))
    if g.chance(0.3):
        q = g.op("RotaryEmbedding", q, *(g.weight(*g.shape(x)[:2], part // 2) for _ in "cs"), num_heads=heads_q)
    h = g.op("Attention", q, k, v, q_num_heads=heads_q, kv_num_heads=heads_kv, is_causal=g.number(0, 1))
    gates = np.repeat(g.rng.random(heads_q) < 0.5, part).astype(np.float32)
    h = g.op("Mul", h, g.const(gates)) if g.chance(0.7) else g.gate(h, -1)
    return str(g.op("MatMul", h, g.weight(heads_q * part, width)))


def rotate_half(g: Writer, x: str) -> str:
    width = g.shape(x)[-1]
    middle, axis = g.ints(g.pick([width // 2, width // 2 - width])), g.ints(g.spelled(-1, len(g.shape(x))))
    a, b = g.op("Slice", x, g.ints(0), middle, axis), g.op("Slice", x, middle, g.ints(LAST), axis)
    return str(g.op("Add", x, g.op("Concat", g.op("Neg", b), a, axis=-1)))


def embedding(g: Writer, x: str) -> str:
    rows, width = g.number(3, 9), g.number(2, 12)
    if "ids" not in g.values:
        g.values["ids"] = g.rng.integers(0, 3, (*g.shape(x)[:1], g.number(1, 5)))
    return str(g.op("Gather", g.weight(rows, width, zero=[1]), "ids", axis=g.pick([0, -2])))


def recurrent(g: Writer, x: str) -> str:
    _, _, width = _rank(g, x, 3)
    kind, hidden = g.pick([("LSTM", 4), ("GRU", 3), ("RNN", 1)]), g.number(1, 5)
    both = g.pick([1, 2])
    weights = g.weight(both, kind[1] * hidden, width, zero=[2]), g.weight(both, kind[1] * hidden, hidden)
    direction = "bidirectional" if both == 2 else g.pick(["forward", "reverse"])
    y = g.op(kind[0], g.op("Transpose", x, perm=[1, 0, 2]), *weights, hidden_size=hidden, direction=direction)
    y = g.op("Transpose", y, perm=[2, 0, 1, 3])
    return str(g.op("Reshape", y, g.ints(0, 0, -1)))


# --- convolutions


def _window(g: Writer, spatial: Sequence[int]) -> dict[str, object]:
    """kernel_shape, strides, pads or auto_pad, dilations."""
    kernel = [g.number(1, min(3, length)) for length in spatial]
    window: dict[str, object] = {"kernel_shape": kernel, "strides": [g.pick([1, 1, 2]) for _ in spatial]}
    way = g.number(0, 3)
    if way == 0:
        window["auto_pad"] = g.pick(["SAME_UPPER", "SAME_LOWER", "VALID"])
    elif way == 1:
        window["pads"] = [g.number(0, k - 1) for k in kernel * 2]
    elif way == 2:
        window["pads"] = [(k - 1) // 2 for k in kernel * 2]
    if g.chance(0.2):
        window["dilations"] = [g.pick([1, 2]) for _ in spatial]
    return window


def conv(g: Writer, x: str) -> str:
    shape = _rank(g, x, 3, 4, 5)
    width = shape[1]
    groups = g.pick([1, 1, _divisor(g, width)])
    out = groups * g.number(1, max(1, 12 // groups))
    window = _window(g, shape[2:])
    weight = g.weight(out, width // groups, *window["kernel_shape"], zero=[0, 1])  # type: ignore[misc]
    extra = [g.weight(out, zero=[0])] if g.chance(0.5) else []
    return str(g.op("Conv", x, weight, *extra, group=groups, **window))


def depthwise(g: Writer, x: str) -> str:
    """A depthwise convolution between two 1 x 1 ones: what MobileNets are made of."""
    shape = _rank(g, x, 3, 4)
    width, ones = shape[1], (1,) * (len(shape) - 2)
    hidden, times = g.pick([8, 12, 16]), g.pick([1, 1, 2])
    h = g.op("Conv", x, g.weight(hidden, width, *ones, zero=[0]), g.weight(hidden, zero=[0]))
    h = normalization(g, h) if g.chance(0.6) else h
    h = g.op(g.pick(["Relu", "HardSwish", "Clip", "Sigmoid"]) if g.opset >= 14 else "Relu", h)
    window = _window(g, g.shape(h)[2:])
    kernel: Sequence[int] = window["kernel_shape"]  # type: ignore[assignment]
    h = g.op("Conv", h, g.weight(hidden * times, 1, *kernel, zero=[0]), group=hidden, **window)
    h = squeeze_excite(g, h) if g.chance(0.3) else h
    h = g.gate(h, 1) if g.chance(0.7) else h
    y = g.op("Conv", h, g.weight(width, hidden * times, *ones, zero=[0]))
    return str(g.op("Add", x, y)) if g.shape(y) == shape else str(y)


def squeeze_excite(g: Writer, x: str) -> str:
    shape = _rank(g, x, 3, 4)
    width, ones, small = shape[1], (1,) * (len(shape) - 2), g.number(1, 4)
    s = g.op("GlobalAveragePool", x)
    s = g.op("Relu", g.op("Conv", s, g.weight(small, width, *ones, zero=[0])))
    return str(g.op("Mul", x, g.op(g.pick(["Sigmoid", "HardSigmoid"]), g.op("Conv", s, g.weight(width, small, *ones)))))


def conv_transpose(g: Writer, x: str) -> str:
    shape = _rank(g, x, 3, 4)
    groups, out = g.pick([1, _divisor(g, shape[1])]), g.number(1, 4)
    kernel, stride = [g.number(1, 3) for _ in shape[2:]], g.pick([1, 2])
    weight = g.weight(shape[1], out, *kernel, zero=[0, 1])
    extra = [g.weight(groups * out, zero=[0])] if g.chance(0.5) else []
    return str(g.op("ConvTranspose", x, weight, *extra, group=groups, strides=[stride] * len(kernel)))


def pool(g: Writer, x: str) -> str:
    shape = _rank(g, x, 3, 4)
    kind = g.pick(["MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool"])
    if kind.startswith("Global"):
        return str(g.op(kind, x))
    window = _window(g, shape[2:])
    if kind != "MaxPool":
        window.pop("dilations", None)
    if kind != "LpPool" and "auto_pad" not in window:
        window["ceil_mode"] = g.number(0, 1)
    if kind == "AveragePool":
        window["count_include_pad"] = g.number(0, 1)
    return str(g.op(kind, x, **window))


def shuffle(g: Writer, x: str) -> str:
    """Channels of groups in turn, as in ShuffleNet; often between grouped convolutions."""
    shape = _rank(g, x, 3, 4)
    width, rest = shape[1], shape[2:]
    groups = _divisor(g, width)
    h = g.op("Reshape", x, g.ints(0, groups, width // groups, *rest))
    h = g.op("Transpose", h, perm=[0, 2, 1, *range(3, 3 + len(rest))])
    h = g.op("Reshape", h, g.ints(g.pick([0, -1]), width, *rest))
    return conv(g, g.gate(h, 1)) if g.chance(0.5) else str(h)


def resize(g: Writer, x: str) -> str:
    shape = _rank(g, x, 3, 4)
    mode = g.pick(["nearest", "linear", "cubic"]) if len(shape) == 4 else g.pick(["nearest", "linear"])
    how = {"mode": mode, "coordinate_transformation_mode": g.pick(["asymmetric", "half_pixel", "align_corners"])}
    if g.chance(0.3):
        sizes = g.ints(*shape[:2], *(g.number(1, 8) for _ in shape[2:]))
        return str(g.op("Resize", x, "", "", sizes, **how))
    scales = [1.0, 1.0, *(g.pick([1.0, 2.0, 0.5]) for _ in shape[2:])]
    return str(g.op("Resize", x, "", g.const(np.array(scales, np.float32)), **how))


def depth_and_space(g: Writer, x: str) -> str:
    _rank(g, x, 4)
    if g.chance(0.5):
        return str(g.op("SpaceToDepth", x, blocksize=2))
    return str(g.op("DepthToSpace", x, blocksize=2, mode=g.pick(["DCR", "CRD"])))


def local_response(g: Writer, x: str) -> str:
    _rank(g, x, 4)
    return str(g.op("LRN", x, size=g.pick([1, 3, 5])))


# --- normalisations


def normalization(g: Writer, x: str) -> str:
    shape = _rank(g, x, 2, 3, 4, 5)
    kind = g.pick(["Batch", "Batch", "Instance", "Group", "Layer", "RMS", "Lp", "MeanVariance", "Softmax", "by hand"])
    if kind == "Batch":
        width = shape[1]
        dead = g.zeros(width) & g.chance(0.6)
        scale, shift = (np.where(dead, 0, g.rng.uniform(0.5, 1.5, width)) for _ in "sb")
        mean = np.where(dead & g.chance(0.7), 0, g.rng.standard_normal(width))
        numbers = [scale, shift, mean, g.rng.uniform(0.5, 2, width)]
        return str(g.op("BatchNormalization", x, *map(g.const, numbers)))
    if kind == "Instance":
        return str(g.op("InstanceNormalization", x, g.weight(shape[1]), g.weight(shape[1], zero=[0])))
    if kind == "Group" and g.opset >= 21:
        groups = _divisor(g, shape[1])
        return str(g.op("GroupNormalization", x, *(g.weight(shape[1], zero=[0]) for _ in "sb"), num_groups=groups))
    if kind == "Layer" and g.opset >= 17:
        axis = g.axis(x) % len(shape)
        extra = [g.weight(*shape[axis:])] if g.chance(0.5) else []
        axis = g.spelled(axis, len(shape))
        return str(g.op("LayerNormalization", x, g.weight(*shape[axis:], zero=[0]), *extra, axis=axis))
    if kind == "RMS" and g.opset >= 23:
        return str(g.op("RMSNormalization", x, g.weight(shape[-1], zero=[0]), axis=g.spelled(-1, len(shape))))
    if kind == "Lp":
        return str(g.op("LpNormalization", g.op("Add", x, g.const(np.float32(0.1))), axis=g.axis(x), p=g.pick([1, 2])))
    if kind == "MeanVariance" and len(shape) == 4:
        return str(g.op("MeanVarianceNormalization", x, axes=[0, 2, 3]))
    if kind == "Softmax":
        return str(g.op(g.pick(["Softmax", "LogSoftmax"]), x, axis=g.axis(x)))
    axis = g.axis(x)
    centred = g.op("Sub", x, _axes(g, "ReduceMean", x, axis, keepdims=1))
    spread = _axes(g, "ReduceMean", g.op("Mul", centred, centred), axis, keepdims=1)
    deviation = g.op("Sqrt", g.op("Add", spread, g.const(np.float32(0.1))))
    return str(g.op("Div", centred, deviation))


# --- parts


def flip(g: Writer, x: str) -> str:
    axes = sorted({g.axis(x) % len(g.shape(x)) for _ in range(g.number(1, 2))})
    n = len(axes)
    spelled = [g.spelled(axis, len(g.shape(x))) for axis in axes]
    starts, ends = g.ints(*[g.pick([-1, LAST])] * n), g.ints(*[g.pick([-LAST, -LAST - 1, -100])] * n)
    return str(g.op("Slice", x, starts, ends, g.ints(*spelled), g.ints(*[-1] * n)))


def slices(g: Writer, x: str) -> str:
    rank = len(g.shape(x))
    axes = sorted({g.axis(x) % rank for _ in range(g.number(1, 2))})
    starts, ends, steps = [], [], []
    for axis in axes:
        length = g.shape(x)[axis]
        step = g.pick([1, 1, 2, 3, -1, -2])
        first, last = sorted(g.number(0, length) for _ in "ab")
        first, last = (first, max(last, first + 1)) if step > 0 else (max(last, 1), first - 1)
        starts.append(first - length if g.chance(0.4) and first < length else first)
        ends.append(last - length if (g.chance(0.4) and 0 < last < length) or last < 0 else last)
        ends[-1] = ends[-1] - length if last < 0 else ends[-1]
        steps.append(step)
    spelled = [g.spelled(axis, rank) for axis in axes]
    return str(g.op("Slice", x, g.ints(*starts), g.ints(*ends), g.ints(*spelled), g.ints(*steps)))


def gather(g: Writer, x: str) -> str:
    axis = g.axis(x)
    length = g.shape(x)[axis]
    shape = g.pick([(), (g.number(1, length + 2),), (g.number(1, length),), (2, 2)])
    indices = np.array([g.some_index(length) for _ in range(math.prod(shape))]).reshape(shape)
    if g.chance(0.3):
        indices = np.arange(length) - length * (g.rng.random(length) < 0.5)  # everything, in order
    return str(g.op("Gather", x, g.const(indices, g.pick([np.int64, np.int32])), axis=axis))


def pick_channels(g: Writer, x: str) -> str:
    """Single channels by negative and positive numbers, combined; the others are never read."""
    h = linear(g, x) if g.chance(0.7) else x
    axis = g.axis(h)
    picked = [g.op("Gather", h, g.const(np.int64(g.some_index(g.shape(h)[axis]))), axis=axis) for _ in range(3)]
    return str(g.op("Sub", picked[0], g.op("Mul", picked[1], picked[2])))


def gather_elements(g: Writer, x: str) -> str:
    axis = g.axis(x)
    shape = list(g.shape(x))
    length, shape[axis] = shape[axis], g.number(1, shape[axis] + 1)
    return str(g.op("GatherElements", x, g.const(g.rng.integers(-length, length, shape)), axis=axis))


def gather_nd(g: Writer, x: str) -> str:
    shape = _rank(g, x, 2, 3, 4)
    turned = g.op("Transpose", x, perm=[*range(1, len(shape)), 0])
    depth = g.number(1, len(shape) - 1)
    count = g.number(1, 6)
    indices = np.stack([g.rng.integers(-n, n, count) for n in shape[1 : 1 + depth]], -1)
    h = g.op("GatherND", turned, g.const(indices))
    rank = len(g.shape(h))
    return str(g.op("Transpose", h, perm=[rank - 1, *range(rank - 1)]))


def scatter(g: Writer, x: str) -> str:
    shape = g.shape(x)
    axis = g.axis(x) % len(shape)
    if g.chance(0.5):
        wide = list(shape)
        wide[axis] = g.number(1, shape[axis])
        places = np.argsort(g.rng.random(shape), axis=axis).take(range(wide[axis]), axis)
        places = places - shape[axis] * (g.rng.random(wide) < 0.5)
        updates = g.weight(*wide, zero=[axis])
        how = {"reduction": "add"} if g.opset >= 16 and g.chance(0.4) else {}
        return str(g.op("ScatterElements", x, g.const(places), updates, axis=g.spelled(axis, len(shape)), **how))
    turned = [axis, *(i for i in range(len(shape)) if i != axis)]
    h = g.op("Transpose", x, perm=turned)
    places = g.rng.permutation(shape[axis])[: g.number(1, shape[axis])]
    places = places - shape[axis] * (g.rng.random(len(places)) < 0.5)
    h = g.op("ScatterND", h, g.const(places[:, None]), g.weight(len(places), *(shape[i] for i in turned[1:])))
    return str(g.op("Transpose", h, perm=np.argsort(turned).tolist()))


def split(g: Writer, x: str) -> Sequence[str]:
    axis = g.axis(x)
    length = g.shape(x)[axis]
    parts = min(g.number(2, 3), length)
    cuts = sorted(g.rng.permutation(np.arange(1, length))[: parts - 1].tolist())
    sizes = np.diff([0, *cuts, length]).tolist()
    pieces = g.op("Split", x, g.ints(*sizes), outputs=len(sizes), axis=axis)
    pieces = [pieces] if len(sizes) == 1 else pieces
    pieces = [g.gate(each, axis) if g.chance(0.4) else each for each in pieces]
    if g.chance(0.6):
        return str(g.op("Concat", *g.rng.permutation(pieces).tolist(), axis=axis))
    return [str(each) for each in pieces]


def concat(g: Writer, x: str) -> str:
    shape = list(g.shape(x))
    axis = g.axis(x)
    if g.chance(0.4):
        shape[axis] = g.number(1, 4)
        other = g.const(np.zeros(shape, np.float32)) if g.chance(0.6) else g.weight(*shape, zero=[axis % len(shape)])
    else:
        other = g.gate(x, axis)
    return str(g.op("Concat", *g.rng.permutation([x, other, *([x] if g.chance(0.2) else [])]).tolist(), axis=axis))


def pad(g: Writer, x: str) -> str:
    shape = g.shape(x)
    pads = np.zeros((2, len(shape)), dtype=np.int64)
    chosen = [g.axis(x) % len(shape) for _ in range(g.number(1, 2))]
    for axis in chosen:
        pads[:, axis] = [g.number(-1, 2), g.number(-1, 2)]
    how = {"mode": g.pick(["constant", "constant", "reflect", "edge", *(["wrap"] if g.opset >= 19 else [])])}
    number = [g.const(np.float32(g.pick([0, 0, 1])))] if how["mode"] == "constant" and g.chance(0.7) else [""]
    if g.opset >= 18 and g.chance(0.5):
        axes = sorted(set(chosen))
        pads = pads[:, axes]
        number.append(g.ints(*(g.spelled(axis, len(shape)) for axis in axes)))
    return str(g.op("Pad", x, g.ints(*pads.reshape(-1).tolist()), *(number if number != [""] else []), **how))


# --- shapes


def reshape(g: Writer, x: str) -> str:
    shape = g.shape(x)
    if len(shape) < 2:
        raise RejectedError("rank")
    way = g.number(0, 4)
    if way == 0 and len(shape) > 2:
        at = g.number(1, len(shape) - 2)
        target = [*[0] * at, g.pick([-1, shape[at] * shape[at + 1]]), *shape[at + 2 :]]
    elif way == 1:
        at = g.number(1, len(shape) - 1)
        part = _divisor(g, shape[at])
        target = [*[0] * at, part, shape[at] // part, *shape[at + 1 :]]
        target[at + g.number(0, 1)] = -1
    elif way == 2:
        target = [g.pick([0, -1]), *g.rng.permutation(shape[1:]).tolist()]
    elif way == 3:
        return str(g.op("Flatten", x, axis=g.spelled(g.number(1, len(shape) - 1), len(shape))))
    else:  # as exporters write it: sizes from the shape itself
        own = g.op("Shape", x)
        batch = g.op("Slice", own, g.ints(-len(shape)), g.ints(1), g.ints(g.pick([0, -1])))
        rest = g.op("Gather", own, g.const(np.int64(g.pick([-1, len(shape) - 1]))), axis=0)
        rest = g.op("Unsqueeze", rest, g.ints(g.pick([0, -1])))
        return str(g.op("Reshape", x, g.op("Concat", batch, g.ints(-1), rest, axis=0)))
    return str(g.op("Reshape", x, g.ints(*target)))


def transpose(g: Writer, x: str) -> str:
    rank = len(g.shape(x))
    perm = [0, *(1 + g.rng.permutation(rank - 1)).tolist()]
    h = g.op("Transpose", x, perm=perm)
    if g.chance(0.3):
        return str(g.op("Transpose", activation(g, h), perm=np.argsort(perm).tolist()))
    return str(h)


def squeeze(g: Writer, x: str) -> str:
    shape = g.shape(x)
    ones = [i for i, n in enumerate(shape) if n == 1 and i]
    if ones and g.chance(0.7):
        return str(g.op("Squeeze", x, g.ints(g.spelled(g.pick(ones), len(shape)))))
    at = g.number(1, len(shape))
    return str(g.op("Unsqueeze", x, g.ints(g.pick([at, at - len(shape) - 1]))))


def repeat(g: Writer, x: str) -> str:
    shape = g.shape(x)
    if g.chance(0.5):
        return str(g.op("Tile", x, g.ints(1, *(g.pick([1, 1, 2]) for _ in shape[1:]))))
    at = g.number(1, len(shape))
    h = g.op("Unsqueeze", x, g.ints(at))
    wide = [1] * (len(shape) + 1)
    wide[at] = g.number(1, 3)
    h = g.op("Expand", h, g.ints(*wide))
    return str(g.op("Reshape", h, g.ints(*([0] * at), -1, *shape[at + 1 :]))) if at < len(shape) else str(h)


def reduce(g: Writer, x: str) -> str:
    kind, axis, keep = g.pick(REDUCTIONS), g.axis(x), g.number(0, 1)
    y = _axes(g, kind, x, axis, since=13 if kind == "ReduceSum" else 18, keepdims=keep)
    if keep and g.chance(0.6):
        return str(g.op(g.pick(["Add", "Sub", "Mul"]), x, y))
    return y


def cumulate(g: Writer, x: str) -> str:
    return str(g.op("CumSum", x, g.const(np.int64(g.axis(x))), reverse=g.number(0, 1), exclusive=g.number(0, 1)))


def triangle(g: Writer, x: str) -> str:
    return str(g.op("Trilu", x, *([g.const(np.int64(g.number(-1, 1)))] if g.chance(0.5) else []), upper=g.number(0, 1)))


# --- detection


def top_k(g: Writer, x: str) -> Sequence[str]:
    axis = g.axis(x)
    k = g.number(1, g.shape(x)[axis])
    values, indices = g.op("TopK", x, g.ints(k), outputs=2, axis=axis, largest=g.number(0, 1))
    if g.chance(0.5):
        return [str(values), str(g.op("GatherElements", g.op("Tanh", x), indices, axis=axis))]
    return [str(values), str(g.op("Mul", g.op("Cast", indices, to=FLOATS), g.const(np.float32(0.1))))]


def arg_max(g: Writer, x: str) -> str:
    kind, axis = g.pick(["ArgMax", "ArgMin"]), g.axis(x)
    best = g.op(kind, x, axis=axis, keepdims=g.number(0, 1), select_last_index=g.number(0, 1))
    if g.chance(0.4):
        values = g.const(np.array(g.pick([[0, 1], [1, 0], [0, 0.5]]), np.float32))
        return str(g.op("OneHot", best, g.const(np.int64(g.shape(x)[axis])), values, axis=g.pick([-1, 1])))
    return str(g.op("Mul", g.op("Cast", best, to=FLOATS), g.const(np.float32(0.1))))


def non_zero(g: Writer, x: str) -> str:
    """The elements above a threshold, as many as there are; their sum goes on."""
    kept = g.op("NonZero", g.op("Greater", x, g.const(np.float32(0.2))))
    picked = g.op("GatherND", g.gate(x, g.axis(x)), g.op("Transpose", kept, perm=[1, 0]))
    total = _axes(g, "ReduceSum", picked, g.pick([0, -1]), since=13, keepdims=1)
    return str(g.op("Add", x, g.op("Tanh", total)))


def boxes(g: Writer, x: str) -> str:
    """Centres and sizes to corners, and the boxes that suppression keeps."""
    _, _, width = _rank(g, x, 3)
    raw = g.op("Sigmoid", g.op("MatMul", x, g.weight(width, 4 + g.number(1, 3), zero=[1])))
    axis = g.ints(g.pick([2, -1]))
    classes = g.shape(raw)[2]
    centre = g.op("Slice", raw, g.ints(0), g.ints(g.pick([2, 2 - classes])), axis)
    size = g.op("Slice", raw, g.ints(g.pick([2, 2 - classes])), g.ints(g.pick([4, 4 - classes])), axis)
    half = g.op("Mul", size, g.const(np.float32(0.5)))
    corners = g.op("Concat", g.op("Sub", centre, half), g.op("Add", centre, half), axis=g.pick([2, -1]))
    scores = g.op("Slice", raw, g.ints(4), g.ints(LAST), axis)
    kept = g.op(
        "NonMaxSuppression",
        *(corners, g.op("Transpose", scores, perm=[0, 2, 1])),
        *(g.ints(3), g.const(np.array([0.5], np.float32)), g.const(np.array([0.1], np.float32))),
    )
    picked = g.op("GatherND", corners, g.op("Gather", kept, g.const(np.array([0, g.pick([2, -1])])), axis=1))
    total = _axes(g, "ReduceSum", picked, 0, since=13, keepdims=1)
    return str(g.op("Add", corners, g.op("Tanh", total)))


# --- quantized


def quantized(g: Writer, x: str) -> str:
    width, out = g.shape(x)[-1], g.number(1, 10)
    weight = g.rng.integers(-9, 9, (width, out)).astype(np.int8)
    weight[:, g.zeros(out)] = 0
    scale = g.const(g.rng.uniform(0.02, 0.1, out).astype(np.float32))
    if g.chance(0.3):
        q, s, z = g.op("DynamicQuantizeLinear", x, outputs=3)
        y = g.op("Cast", g.op("MatMulInteger", q, g.const(weight), z), to=FLOATS)
        return str(g.op("Mul", y, g.op("Mul", s, scale)))
    zero = [g.const(np.zeros(out, np.int8))] if g.chance(0.5) else []
    y = g.op("MatMul", x, g.op("DequantizeLinear", g.const(weight), scale, *zero, axis=g.pick([1, -1])))
    if g.chance(0.5):
        step, point = g.const(np.float32(0.05)), g.const(np.int8(g.number(-3, 3)))
        y = g.op("DequantizeLinear", g.op("QuantizeLinear", g.gate(y, -1), step, point), step, point)
    return str(y)


# --- subgraphs


def branches(g: Writer, x: str) -> str:
    """If, on an input or on a constant; the branches read values from outside."""
    width = g.shape(x)[-1]
    condition = "on" if "on" in g.values and g.chance(0.7) else g.const(np.bool_(g.number(0, 1)))
    weight, reads, graphs = g.weight(width, width, zero=[0, 1]), {x}, []
    for kind in ("then", "else"):
        with g.subgraph() as nodes:
            h = g.op(g.pick(["Tanh", "Neg", "Identity"]), x)
            h = g.gate(h, -1) if g.chance(0.7) else h
            h = g.op("MatMul", h, weight) if g.chance(0.5) else h
            out = g.op("Add", h, g.weight(width, zero=[0]))
        graphs.append(g.graph(kind, nodes, [], [out]))
        reads |= g.captured(nodes)
    return str(g.op("If", condition, then_branch=graphs[0], else_branch=graphs[1], reads=sorted(reads)))


def loop(g: Writer, x: str) -> str:
    """A few turns over a state, which a linear layer that may have dead channels changes."""
    width, state, turn, go = g.shape(x)[-1], g.name("s"), g.name("i"), g.name("b")
    g.values |= {state: g.values[x], turn: np.array(0), go: np.array(True)}
    weight = g.weight(width, width, zero=[0, 1])
    with g.subgraph() as nodes:
        h = g.op("Tanh", g.op("MatMul", state, weight))
        h = g.gate(h, -1) if g.chance(0.7) else h
        h = g.op("Add", h, x) if g.chance(0.5) else h
        same = g.op("Identity", go)
    graph = g.graph("body", nodes, [turn, go, state], [same, h])
    reads = sorted(g.captured(nodes) - {turn, go, state})
    start = g.gate(x, -1) if g.chance(0.5) else x
    return str(g.op("Loop", g.const(np.int64(g.number(1, 3))), "", start, body=graph, reads=reads))


VISION: Mapping[str, Block] = {
    each.__name__: each
    for each in (
        conv,
        depthwise,
        squeeze_excite,
        conv_transpose,
        pool,
        shuffle,
        resize,
        depth_and_space,
        local_response,
    )
}
SEQUENCE: Mapping[str, Block] = {
    each.__name__: each
    for each in (
        linear,
        mlp,
        glu,
        einsum,
        heads,
        attention,
        rotate_half,
        embedding,
        recurrent,
        quantized,
        branches,
        loop,
    )
}
DETECTION: Mapping[str, Block] = {
    each.__name__: each for each in (linear, top_k, arg_max, non_zero, boxes, gemm, compare)
}
ANYWHERE: Mapping[str, Block] = {
    each.__name__: each
    for each in (
        *(
            activation,
            gate,
            gate,
            prelu,
            clip,
            binary,
            bias,
            constants,
            cast,
            compare,
            normalization,
            flip,
            slices,
            gather,
        ),
        *(pick_channels, gather_elements, gather_nd, scatter, split, concat, pad, reshape, transpose, squeeze, repeat),
        *(reduce, cumulate, triangle, linear, gemm, quantized, branches, loop, top_k, arg_max, non_zero),
    )
}
STYLES: Mapping[str, Mapping[str, Block]] = {"vision": VISION, "sequence": SEQUENCE, "detection": DETECTION}

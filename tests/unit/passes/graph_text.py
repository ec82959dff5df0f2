"""Before / expected: a graph as ONNX text, what elimination has to make of it, and the values of both.

Weights are given by shape (seeded normal numbers) or as arrays. The expected graph is compared node by
node; settings (sizes, indices, target shapes) are compared by what they hold, since their names are free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import ShapeInferencePass

from cpcompile.core.cache import complete
from cpcompile.passes.eliminate_dead_channels import Blocked, EliminateDeadChannels, Elimination

Array = npt.NDArray[Any]
Weights = Mapping[str, tuple[int, ...] | Array]
Kept = Mapping[str, Sequence[Sequence[int] | None]]
LENGTHS = {"N": 3, "S": 5, "P": 2}
"""Lengths of the dynamic axes when the graphs are run."""


def parse(text: str, weights: Weights | None = None, *, opset: int = 23, infer: bool = True) -> ir.Model:
    """The model of `text` with its shapes inferred as exporters do; weights become float32."""
    other = ', "other" : 1' if "other." in text else ""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}{other}]> g {text}')
    rng = np.random.default_rng(0)
    for name, weight in (weights or {}).items():
        array = weight if isinstance(weight, np.ndarray) else rng.standard_normal(weight)
        single = array.astype(np.float32) if array.dtype == np.float64 else array
        model.graph.initializer.append(onnx.numpy_helper.from_array(single, name))
    parsed = ir.from_proto(model)
    if infer:
        ShapeInferencePass(check_type=False, strict_mode=False)(parsed)
    return parsed


def run(model: ir.Model | onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs by name: ONNX Runtime, one thread, unoptimised, so that the graph itself is what is tested."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [out.name for out in session.get_outputs()]
    full = complete(feeds, {each.name: each.shape for each in session.get_inputs()})
    return dict(zip(names, session.run(names, full), strict=True))


def check(model: ir.Model) -> None:
    """The standard's checker with full shape inference."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def inputs_of(model: ir.Model, seed: int = 1) -> dict[str, Array]:
    """Random inputs: normal numbers, indices 0 and 1, conditions."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        shape = [d if isinstance(d, int) else LENGTHS[str(d.value)] for d in value.shape]
        if value.dtype.is_floating_point():
            feeds[value.name] = rng.standard_normal(shape).astype(value.dtype.numpy())
        else:
            feeds[value.name] = rng.integers(0, 2, shape).astype(value.dtype.numpy())
    return feeds


def assert_same_values(
    before: ir.Model, after: ir.Model, feeds: Mapping[str, Array] | None = None, *, tolerance: float = 1e-6
) -> None:
    """Same outputs: names, shapes, and values to `tolerance` of the largest; on random inputs if none are given."""
    feeds = inputs_of(before) if feeds is None else feeds
    expected, got = run(before, feeds), run(after, feeds)
    assert list(expected) == list(got)
    for name, array in expected.items():
        assert np.isfinite(array).all()
        assert got[name].shape == array.shape
        error = np.abs(got[name].astype(np.float64) - array).max(initial=0)
        assert error <= tolerance * max(1.0, float(np.abs(array).max(initial=0)))


def eliminate(before: str, weights: Weights | None = None, *, opset: int = 23) -> Elimination:
    """What elimination makes of `before`, checked: same values, valid, and nothing left for a second run."""
    original = parse(before, weights, opset=opset)
    result = EliminateDeadChannels()(parse(before, weights, opset=opset))
    assert isinstance(result, Elimination)
    check(result.model)
    assert_same_values(original, result.model)
    assert not EliminateDeadChannels()(result.model).modified
    for name, axes in result.kept.items():
        whole = original.graph.initializers[name].const_value
        assert whole is not None
        array = whole.numpy()
        for axis, indices in enumerate(axes):
            array = array if indices is None else array.take(indices, axis=axis)
        assert np.array_equal(tensor(result.model, name), array)
    return result


def assert_becomes(before: str, expected: str, weights: Weights, kept: Kept, *, opset: int = 23) -> Elimination:
    """Elimination makes `expected` of `before` and keeps exactly these channels of the weights."""
    result = eliminate(before, weights, opset=opset)
    assert result.modified
    assert canonical(result.model) == canonical(
        parse(expected, {n: tensor(result.model, n) for n in kept}, opset=opset)
    )
    shapes = {name: value if isinstance(value, tuple) else value.shape for name, value in weights.items()}
    for name, axes in kept.items():
        for axis, indices in enumerate(axes):
            own = result.kept[name][axis]
            left = list(range(shapes[name][axis])) if own is None else own.tolist()
            assert left == (list(range(shapes[name][axis])) if indices is None else list(indices)), (name, axis)
    gone = weights.keys() - kept.keys()
    assert not gone & result.model.graph.initializers.keys()
    return result


def blocked_by(result: Elimination) -> list[tuple[str, int, int, str, str]]:
    """What stayed and why: value, axis, channels, operator, reason."""
    return [(b.value, b.axis, b.channels, b.operator, b.reason) for b in result.blocked]


def whole(before: str, weights: Weights, names: Sequence[str], *, opset: int = 23) -> tuple[Blocked, ...]:
    """Nothing is cut from the weights `names`; returns what elimination says of it."""
    result = eliminate(before, weights, opset=opset)
    for name in names:
        assert all(indices is None for indices in result.kept[name]), name
    return result.blocked


def tensor(model: ir.Model, name: str) -> Array:
    """The initializer `name`."""
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def canonical(model: ir.Model | ir.Graph) -> list[tuple[object, ...]]:
    """Inputs, outputs and nodes, also those of subgraphs; integer constants by what they hold."""
    graph = model.graph if isinstance(model, ir.Model) else model

    def operand(value: ir.Value | None) -> object:
        constant = None if value is None else value.const_value
        if constant is not None and constant.dtype.is_integer():
            return constant.numpy().tolist()
        return None if value is None else value.name

    interface = [("interface", [v.name for v in graph.inputs], [v.name for v in graph.outputs])]
    return interface + [
        (
            node.op_type,
            [operand(value) for value in node.inputs],
            [out.name for out in node.outputs],
            sorted(
                (name, str(canonical(value) if isinstance(value := attribute.value, ir.Graph) else value))
                for name, attribute in node.attributes.items()
            ),
        )
        for node in graph
    ]

"""The standard's own node tests as a regression set.

1. every case that ONNX Runtime passes has the same outputs after elimination and clean-up;
2. the same for every operator that has a rule, planted between tensors with dead channels: its inputs pass a
   Gather of all indices (so that they may be cut, which an input of the model may not) and a gate, its
   outputs a gate and a sum (so that not all of them is asked for).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from cpcompile.passes.channel_rules import RULES
from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels
from cpcompile.passes.symbolic_shapes import SINCE
from tests.unit.passes import graph_text

Feeds = Mapping[str, Any]
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)


@pytest.fixture(scope="module")
def cases() -> Sequence[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return [case for case in collect_testcases(None) if case.model is not None]


def run(model: onnx.ModelProto, feeds: Feeds) -> dict[str, Any] | None:
    """Outputs by name; None where ONNX Runtime cannot."""
    try:
        return graph_text.run(model, feeds)
    except Exception:  # not implemented, or refused: ONNX Runtime has no common error class
        return None


def same(first: Any, second: Any, tolerance: float = 1e-6) -> bool:
    if isinstance(first, list):
        return len(first) == len(second) and all(same(a, b, tolerance) for a, b in zip(first, second, strict=True))
    if first is None or second is None:
        return first is second
    a, b = np.asarray(first), np.asarray(second)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind in "fc":
        finite = np.abs(a[np.isfinite(a)]).max(initial=0)
        return np.allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(finite)), equal_nan=True)
    return bool((a == b).all())


def array_of(value: object) -> npt.NDArray[Any] | None:
    """A tensor as an array; None for lists and optionals."""
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.ndarray | np.generic) else None


def feeds_of(case: Any) -> dict[str, Any]:
    values = [numpy_helper.to_array(v) if isinstance(v, TensorProto) else v for v in case.data_sets[0][0]]
    return dict(zip([value.name for value in case.model.graph.input], values, strict=False))


def reaches_reference(case: Any, outputs: Mapping[str, Any]) -> bool:
    """Whether ONNX Runtime agrees with the standard, so that the case says anything."""
    wanted = [numpy_helper.to_array(v) if isinstance(v, TensorProto) else v for v in case.data_sets[0][1]]
    return len(wanted) == len(outputs) and all(
        same(a, b, 1e-3) for a, b in zip(outputs.values(), wanted, strict=True) if array_of(b) is not None
    )


def test_every_case_keeps_its_values(cases: Sequence[Any]) -> None:
    seen: Counter[str] = Counter()
    wrong = []
    for case in cases:
        feeds = feeds_of(case)
        before = run(case.model, feeds)
        if before is None or not reaches_reference(case, before):
            seen["skipped"] += 1
            continue
        model = ir.from_proto(case.model)
        CleanUp()(EliminateDeadChannels()(model).model)
        after = run(ir.to_proto(model), feeds)
        seen["compared"] += 1
        if after is None or list(after) != list(before) or not all(map(same, before.values(), after.values())):
            wrong.append(case.name)
    assert not wrong
    assert seen["compared"] >= 1_400, seen
    assert seen["skipped"] <= 0.25 * len(cases), seen


def gate(length: int, axis: int, rank: int, rng: np.random.Generator, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros and ones along `axis`."""
    return (rng.random(length) < 0.6).astype(dtype).reshape([-1 if a == axis else 1 for a in range(rank)])


def plant(case: Any, rng: np.random.Generator) -> tuple[onnx.ModelProto, Feeds] | None:
    """The case between gates; None if it has lists or optionals."""
    graph = case.model.graph
    inputs, wanted = ([array_of(v) for v in values] for values in case.data_sets[0])
    if any(array is None for array in (*inputs, *wanted)):
        return None
    constants: list[TensorProto] = list(graph.initializer)
    before, after, new_inputs, new_outputs, feeds = [], [], [], [], {}
    for value, array in zip(graph.input, inputs, strict=True):
        dtype = value.type.tensor_type.elem_type
        if dtype not in FLOATS or array.ndim == 0 or array.size == 0:
            constants.append(numpy_helper.from_array(array, value.name))
            continue
        chain = [f"{value.name}.in", *(f"{value.name}.{axis}" for axis in range(array.ndim))]
        new_inputs.append(helper.make_tensor_value_info(chain[0], dtype, array.shape))
        feeds[chain[0]] = array
        for axis, (source, out) in enumerate(pairwise(chain)):
            constants.append(numpy_helper.from_array(np.arange(array.shape[axis]), f"{out}.all"))
            before.append(helper.make_node("Gather", [source, f"{out}.all"], [out], axis=axis))
        axis = int(rng.integers(array.ndim))
        mask = gate(array.shape[axis], axis, array.ndim, rng, array.dtype)
        constants.append(numpy_helper.from_array(mask, f"{value.name}.gate"))
        before.append(helper.make_node("Mul", [chain[-1], f"{value.name}.gate"], [value.name]))
    for value, array in zip(graph.output, wanted, strict=True):
        dtype = value.type.tensor_type.elem_type
        if dtype not in FLOATS or array.ndim == 0 or array.size == 0:
            new_outputs.append(value)
            continue
        axis = int(rng.integers(array.ndim))
        mask = gate(array.shape[axis], axis, array.ndim, rng, array.dtype)
        constants.append(numpy_helper.from_array(mask, f"{value.name}.gate"))
        constants.append(numpy_helper.from_array(np.array([axis]), f"{value.name}.axis"))
        after.append(helper.make_node("Mul", [value.name, f"{value.name}.gate"], [f"{value.name}.gated"]))
        after.append(
            helper.make_node("ReduceSum", [f"{value.name}.gated", f"{value.name}.axis"], [f"{value.name}.out"])
        )
        shape = [1 if a == axis else n for a, n in enumerate(array.shape)]
        new_outputs.append(helper.make_tensor_value_info(f"{value.name}.out", dtype, shape))
    planted = helper.make_graph([*before, *graph.node, *after], "planted", new_inputs, new_outputs, constants)
    model = helper.make_model(planted, opset_imports=case.model.opset_import, ir_version=case.model.ir_version)
    return onnx.shape_inference.infer_shapes(model), feeds


def gathered(model: ir.Model) -> int:
    """How many channels the Gathers before the operator pick."""
    constants = [node.inputs[1] for node in model.graph if node.op_type == "Gather"]
    return sum(v.const_value.size for v in constants if v is not None and v.const_value is not None)


def with_rule(cases: Sequence[Any]) -> Iterator[Any]:
    """Cases of one node that has a rule, in an opset that the rules cover."""
    for case in cases:
        nodes = case.model.graph.node
        opset = max((o.version for o in case.model.opset_import if o.domain == ""), default=0)
        if opset >= SINCE and len(nodes) == 1 and nodes[0].op_type in RULES:
            yield case


def test_every_rule_keeps_values_between_dead_channels(cases: Sequence[Any]) -> None:
    tried: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    wrong = []
    for index, case in enumerate(with_rule(cases)):
        built = plant(case, np.random.default_rng([0, index]))
        before = None if built is None else run(*built)
        if built is None or before is None:
            continue
        if not all(np.isfinite(array).all() for array in before.values() if array.dtype.kind == "f"):
            continue  # 1 / 0: the rules assume finite values
        operator = case.model.graph.node[0].op_type
        model = ir.from_proto(built[0])
        EliminateDeadChannels()(model)
        proto = ir.to_proto(model)
        after = run(proto, built[1])
        onnx.checker.check_model(proto, full_check=True)
        tried[operator] += 1
        cut[operator] += gathered(model) < gathered(ir.from_proto(built[0]))
        if after is None or not all(map(same, before.values(), after.values())):
            wrong.append(case.name)
        if EliminateDeadChannels()(model).modified:
            wrong.append(f"{case.name}: a second run finds something")
    assert not wrong
    assert sum(tried.values()) >= 695, tried
    assert sum(cut.values()) >= 256, cut
    assert len(+cut) >= 75, f"never cut: {tried.keys() - (+cut).keys()}"

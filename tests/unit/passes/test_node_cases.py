"""The standard's own node tests as a regression set.

1. every case that ONNX Runtime passes has the same outputs after all passes of `cpcompile opt` and after each alone:
   as it is, with weights instead of inputs, with inputs that have a default; also bound and merged;
2. the same after elimination for every operator that has a rule, planted between tensors with dead channels: its
   inputs pass a Gather of all indices (so that they may be cut, which an input of the model may not) and a
   gate, its outputs a gate and a sum (so that not all of them is asked for).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from cpcompile.core.errors import CpcompileError
from cpcompile.passes.channel_rules import RULES
from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels
from cpcompile.passes.merge_contexts import merge_contexts
from cpcompile.passes.onnx_inference import inferred
from cpcompile.passes.opset import MIN_OPSET
from cpcompile.pipeline.optimize import DEFAULT, PASSES, apply_pass, optimize_file, parse_pass, prepare
from tests.unit.passes import graph_text

Feeds = Mapping[str, Any]
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)
CASE = Path("case.onnx")
NEED_VALUES = ("bind_context", "trim_vocabulary")
"""Passes that need to be told what to do. No case looks up tables by token ids: `test_trim_vocabulary` has graphs."""


@pytest.fixture(scope="module", params=[8, pytest.param(1, marks=pytest.mark.slow)], ids=["eighth", "all"])
def share(request: pytest.FixtureRequest) -> int:
    """One case in how many is tried."""
    every: int = request.param
    return every


@pytest.fixture(scope="module")
def cases(share: int) -> Sequence[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        # By their names' digests: cases beside each other are alike.
        return [c for c in collect_testcases(None) if c.model is not None and crc32(c.name.encode()) % share == 0]


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
    if a.dtype == np.float16:  # ONNX Runtime keeps more digits between two nodes than a constant has
        tolerance = max(tolerance, 4 * float(np.finfo(a.dtype).eps))
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


@dataclass(frozen=True)
class Passing:
    """A case that ONNX Runtime passes."""

    name: str
    model: onnx.ModelProto
    feeds: Feeds
    outputs: Mapping[str, Any]

    def wrong(self, model: onnx.ModelProto | None, feeds: Feeds | None = None) -> bool:
        """Whether `model` gives something else, or does not run."""
        after = run(model, self.feeds if feeds is None else feeds) if model is not None else None
        if after is None or list(after) != list(self.outputs):
            return True
        return not all(map(same, self.outputs.values(), after.values()))


@pytest.fixture(scope="module")
def passing(cases: Sequence[Any], share: int) -> Sequence[Passing]:
    found = []
    for case in cases:
        feeds = feeds_of(case)
        before = run(case.model, feeds)
        if before is not None and reaches_reference(case, before):
            found.append(Passing(case.name, case.model, feeds, before))
    assert len(found) >= 1_300 / share
    assert len(found) >= 0.75 * len(cases)
    return found


ALONE = [name for name in PASSES if name not in NEED_VALUES]
"""The passes that say by themselves what to do; the others have tests of their own below."""


def prepared(model: onnx.ModelProto) -> ir.Model:
    """As every pass gets it from `cpcompile opt`."""
    graph = ir.from_proto(model)
    prepare(graph, CASE)
    return graph


def optimized(model: onnx.ModelProto, passes: Sequence[str]) -> onnx.ModelProto:
    """What `cpcompile opt` makes of the model in memory."""
    graph = prepared(model)
    for text in passes:
        apply_pass(parse_pass(text), graph, CASE, text)
    return ir.to_proto(graph)


def test_every_case_keeps_its_values_in_a_file(passing: Sequence[Passing], tmp_path: Path) -> None:
    """By the command's own way from file to file: with every pass that needs no value, some cases without --passes."""
    wrong = []
    for number, case in enumerate(passing):
        source, out = tmp_path / "case.onnx", tmp_path / "out.onnx"
        source.write_bytes(case.model.SerializeToString())
        for passes in (ALONE, DEFAULT) if number % 10 == 0 else (ALONE,):
            optimize_file(source, out, passes, check="none")
            if case.wrong(onnx.load(out)):
                wrong.append((case.name, passes))
    assert not wrong


def test_each_pass_alone_keeps_values_and_says_whether_it_did_something(passing: Sequence[Passing]) -> None:
    wrong = []
    for case in passing[::3]:
        model = prepared(case.model)
        before = ir.to_proto(model)
        if case.wrong(before):
            wrong.append((case.name, "prepare"))
        for name in ALONE:
            copy, each = model.clone(), parse_pass(name)
            modified = apply_pass(each, copy, CASE, name).modified
            after = ir.to_proto(copy)
            if modified != (after != before) or (modified and (case.wrong(after) or each(copy).modified)):
                wrong.append((case.name, name))
    assert not wrong


def interface(model: ir.Model) -> list[tuple[str | None, object, int | None]]:
    """Names, types and ranks of the outputs as they follow from the inputs alone, whatever the model says."""
    made = inferred(model, believe=False)
    assert made is not None
    return [(v.name, v.type, None if v.shape is None else v.shape.rank()) for v in made.graph.outputs]


def test_no_pass_changes_the_type_or_the_rank_of_an_output(cases: Sequence[Any], share: int) -> None:
    """Of all cases, whether ONNX Runtime can run them or not, as they are and with constants instead of inputs."""
    tried, wrong, step = 0, [], 1 if share == 1 else 5
    for number, case in enumerate(cases[::step]):
        proto = with_constants(Passing(case.name, case.model, feeds_of(case), {}))[0] if number % 2 else case.model
        model = prepared(proto)
        before = interface(model)
        for name in ALONE:
            copy = model.clone()
            if not apply_pass(parse_pass(name), copy, CASE, name).modified:
                continue
            tried += 1
            known = [
                (old, new)
                for was, now in zip(before, interface(copy), strict=True)
                for old, new in zip(was, now, strict=True)
                if old is not None and new is not None
            ]
            wrong += [(case.name, name, pair) for pair in known if pair[0] != pair[1]]
    assert not wrong
    assert tried > 100 / step / share


def with_constants(case: Passing, rng: np.random.Generator | None = None) -> tuple[onnx.ModelProto, Feeds]:
    """Every input but the first of numbers as an initializer; an `rng` shuffles what they hold."""
    model, left, kept = onnx.ModelProto(), dict(case.feeds), False
    model.CopyFrom(case.model)
    model.ir_version = max(model.ir_version, 4)  # before, every initializer was an input
    for value in list(model.graph.input):
        array = array_of(left.get(value.name))
        if array is None or (array.dtype.kind == "f" and not kept):
            kept = kept or array is not None
            continue
        if rng is not None and array.dtype.kind == "f":
            array = rng.permutation(array.reshape(-1)).reshape(array.shape)
        model.graph.input.remove(value)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), value.name))
        del left[value.name]
    return model, left


def test_every_case_keeps_its_values_with_weights(passing: Sequence[Passing]) -> None:
    """What is an input in the case is a constant: there is something to fold, to transpose and to look into."""
    found = []
    for case in passing[1::3]:
        model, feeds = with_constants(case)
        found.append(Passing(case.name, model, feeds, case.outputs))
    assert sum(len(case.feeds) < 2 for case in found) > 0.9 * len(found)
    assert not [case.name for case in found if case.wrong(optimized(case.model, ALONE))]


def test_nothing_follows_from_a_default_that_the_caller_replaces(passing: Sequence[Passing]) -> None:
    """Inputs with a default of another value: in the result they still are inputs, and what is given counts."""
    found = []
    for case in passing[1::2]:
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        for value in model.graph.input:
            array = array_of(case.feeds.get(value.name))
            if array is not None and array.dtype.kind in "biuf":
                other = ~array if array.dtype.kind == "b" else np.zeros_like(array)
                model.graph.initializer.append(numpy_helper.from_array(np.asarray(other), value.name))
        found.append(Passing(case.name, model, case.feeds, case.outputs))
    # ONNX Runtime wants some settings constant, and some zeros make no sense to it.
    found = [case for case in found if not case.wrong(case.model)]
    assert len(found) > 0.45 * len(passing)
    assert not [case.name for case in found if case.wrong(optimized(case.model, ALONE))]


def test_a_bound_input_of_a_case(passing: Sequence[Passing], share: int) -> None:
    """`bind_context` on every case with an integer scalar: the value that the case has becomes a constant."""
    tried, wrong = 0, []
    for case in passing:
        for value in case.model.graph.input:
            array = array_of(case.feeds.get(value.name))
            if array is None or array.ndim or array.dtype.kind not in "iu" or not value.type.HasField("tensor_type"):
                continue
            feeds = {name: given for name, given in case.feeds.items() if name != value.name}
            proto = optimized(case.model, [f"bind_context:context={array}:name={value.name}", *DEFAULT])
            tried += 1
            if case.wrong(proto, feeds):
                wrong.append((case.name, value.name))
    assert not wrong
    assert tried >= 16 / share


def shapes_of(outputs: Mapping[str, Any]) -> list[object]:
    return [getattr(value, "shape", None) for value in outputs.values()]


def test_two_contexts_with_weights_of_their_own(passing: Sequence[Passing], share: int) -> None:
    """`merge_contexts` on every fourth case: with the constants of the case, and with others."""
    tried: Counter[str] = Counter()
    wrong = []
    rng = np.random.default_rng(0)
    for case in passing[::4]:
        (model, feeds), (other, _) = with_constants(case), with_constants(case, rng)
        first, second = (run(proto, feeds) for proto in (model, other))
        if first is None or second is None or shapes_of(first) != shapes_of(second):
            continue  # the case says of which shape its results are
        if None in shapes_of(first) and model.opset_import[0].version < 16:
            continue  # If makes no lists
        try:
            merged = ir.to_proto(merge_contexts({name: ir.from_proto(m) for name, m in (("a", model), ("b", other))}))
        except CpcompileError as error:
            tried[str(error).partition(":")[2]] += 1
            continue
        tried["merged"] += 1
        for number, expected in enumerate((first, second)):
            if Passing(case.name, merged, {}, expected).wrong(merged, {**feeds, "context": np.array(number)}):
                wrong.append((case.name, number))
    assert not wrong
    assert tried["merged"] >= 300 / share, tried
    assert all("functions" in reason or "opset" in reason for reason in tried.keys() - {"merged"}), tried


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
        if opset >= MIN_OPSET and len(nodes) == 1 and nodes[0].op_type in RULES:
            yield case


def test_every_rule_keeps_values_between_dead_channels(cases: Sequence[Any], share: int) -> None:
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
    assert sum(tried.values()) >= 540 / share, tried
    assert sum(cut.values()) >= 220 / share, cut
    assert share > 1 or len(+cut) >= 75, f"never cut: {tried.keys() - (+cut).keys()}"

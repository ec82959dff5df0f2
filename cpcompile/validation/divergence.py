"""First divergence: the first node of an engine that computes something other than its reference.

`run_in_lockstep` hands every node of the engine what the reference computed, so that errors do not add up and
the first value that differs names its culprit. Two graphs may round differently (a product of sliced or divided
weights sums in another order), and how much is measured where it matters:

    e = max |engine - reference| on equal inputs            judged: e <= max(ROUNDINGS * eps * max |reference|, 8 d)
    d = max |f(x + dx) - f(x)|,   dx = +-sqrt(n) eps x      the engine's nodes, asked again with all that they
                                                            read (weights, too) moved at random

n is the longest axis of what is moved: the sum of n terms is the exact sum of terms that are moved by about
sqrt(n) roundings (Higham & Mary, 2019, doi:10.1137/18M1226312). As d grows with the condition of the operator,
cancellation raises no false alarm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from cpcompile.bundle.reader import Variant
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.types import Steps, unwatched
from cpcompile.files.onnx_file import module_of
from cpcompile.report.results import LayerError
from cpcompile.validation.fragment import Fragment, Values
from cpcompile.validation.lockstep import Pair, run_in_lockstep
from cpcompile.validation.output_comparison import OutputComparison, compare_arrays

ROUNDINGS = 32
"""Five times the largest that sound engines showed (SmolLM2: 5.2 in a product, 6.7 in an attention layer)."""
CANDIDATES = 4
"""Number of candidates that a sentence lists."""
ENGINE, INPUTS, EXPECTED, README = "engine.onnx", "inputs.npz", "expected.npz", "README.txt"
RUN = f"""import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
session = ort.InferenceSession("{ENGINE}", options, providers=["CPUExecutionProvider"])
(got,) = session.run(None, dict(np.load("{INPUTS}")))
(expected,) = np.load("{EXPECTED}").values()
print(got.shape, expected.shape, abs(got - expected).max())
"""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first node that differs, on inputs that agree."""

    node: str
    operator: str
    module: str
    """Path of the torch module that the node came from; empty where the graph does not say."""
    value: str
    """What the node computes."""
    reason: str
    max_abs_error: float | None
    """None if it is not a number: other shapes, not finite, or the engine raised."""
    tolerance: float | None
    candidates: tuple[str, ...] = ()
    """`operator node` of the engine, if several nodes correspond to one in the reference, or names differ."""
    inputs: Values = field(repr=False, compare=False)
    """Inputs of the nodes, without weights."""
    expected: Any = field(repr=False, compare=False)
    """The reference's value."""
    fragment: Fragment = field(repr=False, compare=False)
    """The nodes of the engine; none if the engine has the value as a constant."""

    def __str__(self) -> str:
        """The divergence in one sentence."""
        where = f" in {self.module}" if self.module else ""
        among, count = "", len(self.candidates)
        if count > CANDIDATES:
            among = f" (one of {count} nodes, {self.candidates[0]} to {self.candidates[-1]})"
        elif count:
            among = f" (one of {', '.join(self.candidates)})"
        reason = self.reason.replace("it ", f"{self.value} ", 1)
        return f"the first node that differs is {self.operator} {self.node}{where}{among}: {reason}"


def engine_graph(variant: Variant) -> ir.Model:
    """The graph of an engine; its weights stay in their file."""
    model = variant.graph()
    model.graph.sort()  # as ONNX Runtime does
    return model


def find_divergence(reference: ir.Model, engine: ir.Model, feeds: Values, *, sliced: bool = False) -> Divergence | None:
    """The first node of `engine` that differs from `reference` on `feeds`; None if each node by itself agrees.

    External weights stay external. sliced: channels of the reference were removed from the engine; only what has
    the same shape in both is compared, and a difference is that of a region, whose nodes are the candidates.
    UsageError: an input is missing. CpcompileError: the reference cannot be run.
    """
    for pair in run_in_lockstep(reference, engine, feeds, sliced=sliced):
        if (found := _judge(pair)).reason is not None:
            return _divergence(pair, found)
    return None


def layer_errors(
    reference: ir.Model, engine: ir.Model, feeds: Values, *, sliced: bool = False, steps: Steps = unwatched
) -> tuple[LayerError, ...]:
    """How the engine's error grows from module to module when it reads its own values, in the order of the modules."""
    leaving = _leaving(reference)
    errors: dict[str, LayerError] = {}
    place = {out.name: number for number, node in enumerate(engine.graph) for out in node.outputs}
    for pair in run_in_lockstep(reference, engine, feeds, sliced=sliced, forced=False):
        steps(place.get(pair.name, 0), len(engine.graph))
        if pair.error is not None or pair.expected.dtype.kind != "f":
            continue
        for module in leaving.get(pair.name, ()):
            found = compare_arrays(pair.name, pair.expected, pair.expected, pair.got)
            finite = pair.expected[np.isfinite(pair.expected)]
            errors.pop(module, None)  # the last value that leaves it counts, at its place
            largest = float(np.abs(finite).max(initial=0.0))
            errors[module] = LayerError(module, pair.name, found.max_abs_error, largest)
    return tuple(errors.values())


def write_repro(divergence: Divergence, folder: Path) -> Path:
    """Write the nodes with their weights, their inputs, what they should give, and how to run that; returns `folder`.

    UsageError: the folder cannot be written, or holds something else. CpcompileError: there is no node to run.
    """
    fragment, given = divergence.fragment, divergence.inputs
    if not fragment.nodes:
        raise CpcompileError(f"{divergence.value} is a constant of the engine: there is no node to run")
    own = {ENGINE, INPUTS, EXPECTED, README}
    inputs = {name: value for name, value in given.items() if name in fragment.reads}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if foreign := sorted(path.name for path in folder.iterdir() if path.name not in own):
            raise UsageError(f"{folder}: holds {foreign[0]}; name a new folder for the repro")
        model = fragment.proto(inputs, [divergence.value], weights=fragment.weights(inputs))
        onnx.save(model, folder / ENGINE)
        np.savez(folder / INPUTS, **inputs)
        np.savez(folder / EXPECTED, **{divergence.value: divergence.expected})
        text = f"{str(divergence)[:1].upper()}{str(divergence)[1:]}.\n\nRun it here with: python -c '\n{RUN}'\n"
        (folder / README).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); name another folder") from error
    return folder


def _judge(pair: Pair) -> OutputComparison:
    """Whether the engine's value is the reference's; what its nodes may round is measured only if it seems not."""
    if pair.error is not None:
        return OutputComparison(pair.name, None, None, f"it cannot be computed: {pair.error}")
    found = compare_arrays(pair.name, pair.expected, pair.expected, pair.got, roundings=ROUNDINGS)
    if found.reason is None or found.max_abs_error is None or pair.got.dtype.kind != "f" or not pair.fragment.nodes:
        return found
    generator = np.random.default_rng(0)
    (moved,) = pair.fragment.run(pair.given, [pair.name], change=lambda value: _moved(value, generator))
    with np.errstate(invalid="ignore", over="ignore"):  # where not finite, there is no noise
        noise = pair.expected + (moved - pair.got)
    return compare_arrays(pair.name, pair.expected, noise, pair.got, roundings=ROUNDINGS)


def _moved(value: Any, generator: np.random.Generator) -> Any:
    """`value` with every number moved by sqrt(n) roundings up or down."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value
    moved = generator.integers(0, 2, value.shape, dtype=np.int8).astype(value.dtype)  # in place: weights are large
    moved -= 0.5
    moved *= 2 * math.sqrt(max(value.shape, default=1)) * float(np.finfo(value.dtype).eps)
    moved += 1
    with np.errstate(over="ignore"):
        moved *= value
    np.copyto(moved, value, where=~np.isfinite(moved))  # the lowest number, as masks have it, stays
    return moved


def _divergence(pair: Pair, found: OutputComparison) -> Divergence:
    nodes = pair.fragment.nodes
    # Where the engine needs several nodes, the reference's says what they are to do.
    node = nodes[0] if len(nodes) == 1 else pair.twin or nodes[-1]
    modules = (module_of(each) for each in (node, pair.twin, *reversed(nodes)) if each is not None)
    return Divergence(
        node=node.name or "",
        operator=node.op_type,
        module=next(filter(None, modules), ""),
        value=pair.name,
        reason=found.reason or "",
        max_abs_error=found.max_abs_error,
        tolerance=found.tolerance,
        candidates=tuple(f"{each.op_type} {each.name}" for each in nodes) if len(nodes) > 1 else (),
        inputs=pair.given,
        expected=pair.expected,
        fragment=pair.fragment,
    )


def _leaving(model: ir.Model) -> Mapping[str, tuple[str, ...]]:
    """Value -> the modules that it leaves: somebody outside reads it, or it is an output of the graph."""
    leaving = {}
    for node in model.graph:
        inside = list(_enclosing(module_of(node)))
        for out in node.outputs:
            readers = [] if out.is_graph_output() else [set(_enclosing(module_of(use.node))) for use in out.uses()]
            left = [m for m in inside if out.is_graph_output() or any(m not in reader for reader in readers)]
            if left and out.name:
                leaving[out.name] = tuple(left)
    return leaving


def _enclosing(module: str) -> Iterator[str]:
    """`layers.0.ffn` -> `layers.0.ffn`, `layers.0`, `layers`, and the whole model."""
    while module:
        yield module
        module = module.rpartition(".")[0]
    yield ""

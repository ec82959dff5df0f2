"""Where an engine diverges from the model: the first differing node if parity fails; the error per layer in any case.

engine against frozen    the same graph, freshly frozen from the model: whatever happened after freezing
engine against bound     the dynamic graph with the context bound: what freezing itself got wrong; the values that
                         the context keeps whole (the residual stream, say) are compared, and name the nodes between;
                         where parity passes, their errors show how rounding grows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from cpcompile.bundle.reader import Bundle, Variant
from cpcompile.core.errors import CpcompileError
from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Feeds, Progress, Steps
from cpcompile.files.onnx_file import opset_of
from cpcompile.report.formats import NO_FAILURE
from cpcompile.report.results import Diagnosis, LayerError, Results, VariantResult
from cpcompile.validation.divergence import Divergence, engine_graph, find_divergence, layer_errors, write_repro
from cpcompile.validation.reference import Reference, Run

NOT_WANTED = "no folder was given with --repro"
EACH_AGREES = "every node of the engine, run alone, computes what it should; the runtime's optimisations may be wrong"
NO_NUMBERS = "the eager model itself computes NaN or infinity, and so does the engine; look at the weights of the model"
OTHER_KIND = "nodes are compared only in float32 engines of ONNX Runtime for one context"


class Graphs(Protocol):
    """Graphs freshly made from the model, as the engines of a context should compute."""

    def frozen(self, context: str, opset: int) -> ir.Model:
        """The graph sliced like the engine."""

    def bound(self, context: str, opset: int) -> ir.Model:
        """The whole graph, with the context as a constant."""


def diagnose(
    bundle: Bundle,
    results: Results,
    reference: Reference,
    graphs: Graphs,
    repro: Path | None,
    *,
    layers: bool,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Results:
    """`results` by context, with a diagnosis of those that failed parity; repros go to `repro`/<context>-<variant>.

    layers: those that passed get the errors of their layers.
    """

    def diagnosed(context: str, result: VariantResult) -> VariantResult:
        if result.kept:
            return result
        variant = bundle.variant(context, result.name)
        steps = partial(progress, f"validate: layers of {context} {result.name}")
        if result.parity.verdict == "fail":
            return dataclasses.replace(result, divergence=_diagnose(bundle, variant, reference, graphs, repro, steps))
        if layers and result.status == "ran" and result.parity.verdict == "pass":
            return dataclasses.replace(result, divergence=_layers(variant, reference, graphs, steps))
        return result

    return {context: tuple(diagnosed(context, each) for each in own) for context, own in results.items()}


def _layers(variant: Variant, reference: Reference, graphs: Graphs, steps: Steps) -> Diagnosis:
    """The errors of the layers of an engine that passed, on the largest input."""
    return Diagnosis.without(NO_FAILURE, layers=_layer_errors(variant, reference, graphs, steps))


def _layer_errors(
    variant: Variant, reference: Reference, graphs: Graphs, steps: Steps
) -> tuple[LayerError, ...] | NotMeasured:
    if not _nodes_are_known(variant):
        return NotMeasured(OTHER_KIND)
    feeds = max(reference.inputs(variant.context), key=lambda each: sum(array.size for array in each.values()))
    engine = engine_graph(variant)
    try:
        steps(0, len(engine.graph))
        errors = layer_errors(graphs.bound(variant.context, opset_of(engine)), engine, feeds, sliced=True, steps=steps)
        steps(len(engine.graph), len(engine.graph))
        return errors
    except CpcompileError as error:
        return NotMeasured(str(error))


def _nodes_are_known(variant: Variant) -> bool:
    return not variant.feeds and (variant.runtime, variant.precision) == ("onnxruntime", "fp32")


def _diagnose(
    bundle: Bundle, variant: Variant, reference: Reference, graphs: Graphs, repro: Path | None, steps: Steps
) -> Diagnosis:
    context = variant.context
    if not _nodes_are_known(variant):
        return Diagnosis.without(OTHER_KIND)
    bundle.verify_engine(variant)
    engine = engine_graph(variant)
    opset, inputs = opset_of(engine), list(reference.inputs(context))
    try:
        frozen = graphs.frozen(context, opset)
        found = _first(frozen, engine, inputs, whole=False)
        if found is None:
            found = _first(graphs.bound(context, opset), engine, inputs, whole=True)
        if found is None:
            return Diagnosis.without(EACH_AGREES if _is_finite(reference.masked(context), inputs) else NO_NUMBERS)
        divergence, feeds = found
        layers = layer_errors(frozen, engine, feeds, steps=steps)
    except CpcompileError as error:
        return Diagnosis.without(str(error))
    no_number = NotMeasured(divergence.reason)
    return Diagnosis(
        sentence=str(divergence),
        node=divergence.node,
        operator=divergence.operator,
        module=divergence.module,
        value=divergence.value,
        difference=divergence.reason,
        max_abs_error=no_number if divergence.max_abs_error is None else divergence.max_abs_error,
        tolerance=no_number if divergence.tolerance is None else divergence.tolerance,
        candidates=divergence.candidates,
        repro=_write_repro(divergence, repro and repro / f"{context}-{variant.name}"),
        layers=layers,
    )


def _is_finite(run: Run, inputs: Sequence[Feeds]) -> bool:
    """Whether all numbers that the model computes are."""
    return all(np.isfinite(output).all() for feeds in inputs for output in run(feeds).values())


def _write_repro(divergence: Divergence, folder: Path | None) -> str | NotMeasured:
    if folder is None:
        return NotMeasured(NOT_WANTED)
    try:
        return str(write_repro(divergence, folder))
    except CpcompileError as error:
        return NotMeasured(str(error))


def _first(
    graph: ir.Model, engine: ir.Model, inputs: Sequence[Feeds], *, whole: bool
) -> tuple[Divergence, Feeds] | None:
    """The divergence on the first of `inputs` that shows one, and that input."""
    for feeds in inputs:
        if (found := find_divergence(graph, engine, feeds, sliced=whole)) is not None:
            return found, feeds
    return None

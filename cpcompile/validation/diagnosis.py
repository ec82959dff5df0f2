"""Where an engine leaves the model: the first node that differs, where parity fails; the error per layer in any case.

engine against frozen    the same graph, freshly frozen from the model: whatever happened after freezing
engine against bound     the dynamic graph with the context bound: what freezing itself got wrong; the values that
                         the context has whole (the residual stream, say) are compared, and name the nodes between;
                         where parity passes, their errors show how rounding grows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from cpcompile.bundle.reader import Bundle, Variant
from cpcompile.core.errors import CpcompileError
from cpcompile.core.types import Feeds
from cpcompile.files.onnx_file import opset_of
from cpcompile.report.formats import NO_FAILURE
from cpcompile.validation.divergence import (
    Divergence,
    LayerError,
    engine_graph,
    find_divergence,
    layer_errors,
    write_repro,
)
from cpcompile.validation.reference import Reference
from cpcompile.validation.validator import VariantResult

NOT_WANTED = "no folder was given with --repro"
EACH_AGREES = "every node of the engine, run alone, computes what it should; the runtime's optimisations may be wrong"
OTHER_KIND = "nodes are compared only in float32 engines of ONNX Runtime for one context"
FIELDS = (
    "sentence",
    "node",
    "operator",
    "module",
    "value",
    "difference",
    "max_abs_error",
    "tolerance",
    "repro",
    "layers",
)


class Graphs(Protocol):
    """Graphs freshly made from the model, as the engines of a context should compute."""

    def frozen(self, context: str, opset: int) -> ir.Model:
        """Sliced as the engine is."""

    def bound(self, context: str, opset: int) -> ir.Model:
        """Whole, with the context as a constant."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The first divergence as the report states it."""

    sentence: str | None = None
    node: str | None = None
    operator: str | None = None
    module: str | None = None
    value: str | None = None
    difference: str | None = None
    max_abs_error: float | None = None
    tolerance: float | None = None
    candidates: Sequence[str] = ()
    repro: str | None = None
    """Folder of the minimal repro."""
    layers: Sequence[LayerError] | None = None
    """The error of the whole engine, module by module."""
    not_measured: dict[str, str] = field(default_factory=dict)
    """Field -> why it is null."""

    @classmethod
    def without(cls, reason: str) -> Diagnosis:
        """Nothing was found."""
        return cls(not_measured=dict.fromkeys(FIELDS, reason))


def diagnose(
    bundle: Bundle,
    results: Iterable[VariantResult],
    reference: Reference,
    graphs: Graphs,
    repro: Path | None,
    *,
    layers: bool,
) -> tuple[VariantResult, ...]:
    """`results`, those that failed parity with their diagnosis; repros go to `repro`/<context>-<variant>.

    layers: those that passed get the errors of their layers.
    """

    def diagnosed(result: VariantResult) -> VariantResult:
        if result.parity.verdict == "fail":
            return dataclasses.replace(result, divergence=_diagnose(bundle, result, reference, graphs, repro))
        if layers and result.status == "ran" and result.parity.verdict == "pass":
            return dataclasses.replace(result, divergence=_layers(bundle, result, reference, graphs))
        return result

    return tuple(map(diagnosed, results))


def _layers(bundle: Bundle, result: VariantResult, reference: Reference, graphs: Graphs) -> Diagnosis:
    """The errors of the layers of an engine that passed, on the largest input."""
    variant, reasons = bundle.variant(result.context, result.name), dict.fromkeys(FIELDS, NO_FAILURE)
    if not _nodes_are_known(variant):
        return Diagnosis(not_measured=reasons | {"layers": OTHER_KIND})
    feeds = max(reference.inputs(result.context), key=lambda each: sum(array.size for array in each.values()))
    engine = engine_graph(variant)
    try:
        errors = layer_errors(graphs.bound(result.context, opset_of(engine)), engine, feeds, sliced=True)
    except CpcompileError as error:
        return Diagnosis(not_measured=reasons | {"layers": str(error)})
    del reasons["layers"]
    return Diagnosis(layers=errors, not_measured=reasons)


def _nodes_are_known(variant: Variant) -> bool:
    return not variant.feeds and (variant.runtime, variant.precision) == ("onnxruntime", "fp32")


def _diagnose(
    bundle: Bundle, result: VariantResult, reference: Reference, graphs: Graphs, repro: Path | None
) -> Diagnosis:
    context = result.context
    variant = bundle.variant(context, result.name)
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
            return Diagnosis.without(EACH_AGREES)
        divergence, feeds = found
        layers = layer_errors(frozen, engine, feeds)
    except CpcompileError as error:
        return Diagnosis.without(str(error))
    folder, reasons = None, {"repro": NOT_WANTED}
    if repro is not None:
        try:
            folder, reasons = write_repro(divergence, repro / f"{context}-{result.name}"), {}
        except CpcompileError as error:
            reasons = {"repro": str(error)}
    no_number = dict.fromkeys(("max_abs_error", "tolerance"), divergence.reason)
    return Diagnosis(
        sentence=str(divergence),
        node=divergence.node,
        operator=divergence.operator,
        module=divergence.module,
        value=divergence.value,
        difference=divergence.reason,
        max_abs_error=divergence.max_abs_error,
        tolerance=divergence.tolerance,
        candidates=divergence.candidates,
        repro=str(folder) if folder else None,
        layers=layers,
        not_measured=reasons | (no_number if divergence.max_abs_error is None else {}),
    )


def _first(
    graph: ir.Model, engine: ir.Model, inputs: Sequence[Feeds], *, whole: bool
) -> tuple[Divergence, Feeds] | None:
    """The divergence on the first of `inputs` that shows one, and that input."""
    for feeds in inputs:
        if (found := find_divergence(graph, engine, feeds, sliced=whole)) is not None:
            return found, feeds
    return None

"""Engines for the CPU: in float32, or with parameters rounded to few bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.config import MIXED, BuildConfig
from cpcompile.core.rounding import SCHEMES
from cpcompile.core.types import Steps
from cpcompile.exporters.onnxruntime_exporter import export_onnxruntime, variant_name
from cpcompile.exporters.openvino_exporter import export_openvino
from cpcompile.exporters.openvino_exporter import variant_name as openvino_name
from cpcompile.passes.freeze import Frozen
from cpcompile.passes.group_query_attention import GroupQueryAttention
from cpcompile.passes.quantize_dynamic import QuantizeDynamic
from cpcompile.passes.quantize_weights import QuantizeWeights
from cpcompile.passes.quantized_parameters import NothingToRoundError
from cpcompile.passes.rms_normalization import RmsNormalization
from cpcompile.passes.rotary_embedding import RotaryEmbedding
from cpcompile.passes.share_weights import KeptChannels, Whole
from cpcompile.passes.standard_products import StandardProducts
from cpcompile.passes.tied_head import TiedHead
from cpcompile.pipeline.stored_weights import NOT_STORED, Stored, derive, kept_of, store

FUSIONS: tuple[ir.passes.InPlacePass, ...] = (
    CommonSubexpressionEliminationPass(),
    RmsNormalization(),
    RotaryEmbedding(),
    GroupQueryAttention(),
)
"""What brings a graph into the operators of ONNX Runtime, in this order."""


@dataclass(frozen=True)
class Graphs:
    """The graphs of all contexts, what each has kept of every parameter, and the whole parameters."""

    models: Mapping[str, ir.Model]
    kept: Mapping[str, KeptChannels]
    whole: Mapping[str, Whole]


def export_rounded(
    writer: BundleWriter,
    frozen: Mapping[str, Frozen],
    parameters: Mapping[str, Whole],
    schemes: Mapping[str, str],
    precision: str,
    config: BuildConfig,
    steps: Steps,
) -> None:
    """Write an engine of every context, called after `precision`; they share their weights in a file of their own.

    parameters: those of all contexts. schemes: the name of the scheme by which each of them is rounded. `frozen` stays
    as it is.
    """
    graphs = rounded_graphs(frozen, parameters, schemes, precision, tie=not config.standard_operators)
    models, stored = graphs.models, store_weights(writer, graphs, config)
    for done, (context, model) in enumerate(models.items()):
        steps(done, len(models))
        export_for_cpu(writer, context, model, stored, config, precision)
    steps(len(models), len(models))


def export_all_for_openvino(
    writer: BundleWriter,
    frozen: Mapping[str, Frozen],
    parameters: Mapping[str, Whole],
    precision: str,
    config: BuildConfig,
) -> None:
    """Write an OpenVINO engine of every context, with a file of weights that they share."""
    graphs = rounded_graphs(frozen, parameters, {}, precision, tie=False)
    stored = store_weights(writer, graphs, config)
    for context, model in graphs.models.items():
        export_for_openvino(writer, context, model, stored, precision)


def store_weights(writer: BundleWriter, graphs: Graphs, config: BuildConfig) -> Stored:
    """Write the weights of `graphs` to a file that they then read, unless every engine has its own inside."""
    return NOT_STORED if config.standalone else store(writer, graphs.models, graphs.kept, graphs.whole)


def rounded_graphs(
    frozen: Mapping[str, Frozen],
    parameters: Mapping[str, Whole],
    schemes: Mapping[str, str],
    precision: str,
    *,
    tie: bool,
) -> Graphs:
    """Copies of the graphs of all contexts, with the parameters in `schemes` rounded, as in `export_rounded`.

    tie: whether tied heads are stored as ONNX Runtime reads them fastest. NothingToRoundError: a context has nothing
    that `precision` rounds.
    """
    whole = dict(parameters)
    models: dict[str, ir.Model] = {}
    kept: dict[str, KeptChannels] = {}
    for context, each in frozen.items():
        models[context] = each.model.clone()
        kept[context] = kept_of(each, parameters)
        with suppress(NothingToRoundError) if precision == MIXED else naming_context(context, precision):
            kept[context] = round_parameters(models[context], kept[context], whole, schemes)
        if tie:
            kept[context] = derive(TiedHead(kept[context], whole), models[context], kept[context], whole)
    return Graphs(models, kept, whole)


@contextmanager
def naming_context(context: str, precision: str) -> Iterator[None]:
    """Let a NothingToRoundError name the context, and the precision to leave out."""
    try:
        yield
    except NothingToRoundError as error:
        raise NothingToRoundError(f"{context}: {error}; leave {precision} out") from error


def round_parameters(
    model: ir.Model, kept: KeptChannels, whole: dict[str, Whole], schemes: Mapping[str, str]
) -> KeptChannels:
    """Round the parameters of `model`, each by its scheme if it has one; returns what the graph then has of each.

    A scheme may have nothing to do in a context that lacks its parameters. NothingToRoundError: all of them.
    """
    nothing: list[NothingToRoundError] = []
    used = dict.fromkeys(scheme for scheme in SCHEMES if scheme in schemes.values())
    for scheme in used:
        own = {name: axes for name, axes in kept.items() if schemes.get(name) == scheme}
        try:
            kept = derive(quantize(scheme, own, whole), model, kept, whole)
        except NothingToRoundError as error:
            nothing.append(error)
    if nothing and len(nothing) == len(used):
        raise nothing[0]
    return kept


def quantize(scheme: str, kept: KeptChannels, whole: Mapping[str, Whole]) -> ir.passes.InPlacePass:
    """The pass that rounds the parameters in `kept` by `scheme`."""
    return (QuantizeWeights if SCHEMES[scheme].block else QuantizeDynamic)(scheme, kept, whole)


def export_for_cpu(
    writer: BundleWriter, context: str, model: ir.Model, stored: Stored, config: BuildConfig, precision: str = "fp32"
) -> None:
    """Write the engine of one context, in the operators that the build may use."""
    if not config.standard_operators:
        model = fused_for_cpu(model)
    folder = writer.folder(context, variant_name(precision))
    artifact = export_onnxruntime(model, folder, weights=stored.file, locations=stored.locations, precision=precision)
    writer.add_variant(context, artifact, weights=stored.uri)


def export_for_openvino(writer: BundleWriter, context: str, frozen: ir.Model, stored: Stored, precision: str) -> None:
    """Write the OpenVINO engine of one context, which reads the same weights; `frozen` stays as it is."""
    model = frozen.clone()
    StandardProducts()(model)
    folder = writer.folder(context, openvino_name(precision))
    artifact = export_openvino(model, folder, weights=stored.file, locations=stored.locations, precision=precision)
    writer.add_variant(context, artifact, weights=stored.uri)


def fused_for_cpu(frozen: ir.Model, passes: Sequence[ir.passes.InPlacePass] = FUSIONS) -> ir.Model:
    """A copy in operators that ONNX Runtime computes faster on the CPU; tensors are shared."""
    model = frozen.clone()
    for each in passes:
        each(model)
    return model

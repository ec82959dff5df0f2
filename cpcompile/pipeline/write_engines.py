"""Frozen graphs -> weights, tokenizers and engines in a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from cpcompile.bundle.reader import ROUTER, TOKEN_IDS
from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.config import BuildConfig
from cpcompile.core.rounding import SCHEMES
from cpcompile.core.types import Progress
from cpcompile.exporters.onnxruntime_exporter import MERGED, export_onnxruntime, variant_name
from cpcompile.exporters.tensorrt_exporter import export_tensorrt
from cpcompile.exporters.tensorrt_exporter import variant_name as plan_name
from cpcompile.exporters.weights_file import INLINE, write_weights
from cpcompile.files.whole_files import file_digest
from cpcompile.frontend.source import Source
from cpcompile.passes.cache_interface import bytes_per_token
from cpcompile.passes.dequantize_weights import DequantizeWeights
from cpcompile.passes.equal_caches import with_equal_caches
from cpcompile.passes.fold_gates import FoldGates
from cpcompile.passes.freeze import Frozen
from cpcompile.passes.infer_shapes import InferShapes
from cpcompile.passes.legalize_for_tensorrt import LegalizeForTensorRT
from cpcompile.passes.lower_precision import HALVES, LowerPrecision
from cpcompile.passes.merge_contexts import merge_contexts
from cpcompile.passes.remove_cache import with_all_logits, without_cache
from cpcompile.passes.share_weights import Whole
from cpcompile.pipeline.accounting import Accounting
from cpcompile.pipeline.cpu_engines import (
    export_for_cpu,
    export_for_openvino,
    export_rounded,
    naming_context,
    rounded_graphs,
    store_weights,
)
from cpcompile.pipeline.stored_weights import WEIGHTS_FILE, kept_of
from cpcompile.targets.requests import CPU, CUDA, NOTHING_ADDED, OPENVINO, Added
from cpcompile.text.vocabulary import TrimmedVocabulary


def export_engines(
    writer: BundleWriter,
    dynamic: ir.Model,
    frozen: Mapping[str, Frozen],
    parameters: Mapping[str, Whole],
    accounts: Mapping[str, Accounting],
    source: Source,
    trimmed: Mapping[str, TrimmedVocabulary],
    config: BuildConfig,
    done: Callable[[], None],
    added: Added = NOTHING_ADDED,
) -> dict[str, Any]:
    """Write weights, tokenizers and engines; returns the metadata that the bundle records.

    parameters: those of all contexts. done: called after the weights and tokenizers, and after each context. added:
    those for OpenVINO are written here, because they read the weights of the engines in float32; `export_added` writes
    the others. `frozen` stays as it is.
    """
    graphs = rounded_graphs(frozen, parameters, {}, "fp32", tie=not config.standard_operators)
    stored = store_weights(writer, graphs, config)
    tokenizers = {}
    for context in frozen:
        own = trimmed.get(context)
        text = own.tokenizer_json if own else source.tokenizer
        if text is None:
            continue
        staging = writer.stage("tokenizer")
        (staging / "tokenizer.json").write_text(text, encoding="utf-8")
        if own:
            np.save(staging / TOKEN_IDS, own.kept)
        tokenizers[context] = writer.add_asset(staging)
    done()
    for context, model in graphs.models.items():
        export_for_cpu(writer, context, model, stored, config)
        for target in added.targets:
            for precision in added.precisions_of(target) if target.flavour == OPENVINO else ():
                export_for_openvino(writer, context, model, stored, precision)
        done()
    if config.merged:
        one = merge_contexts(with_equal_caches(graphs.models))
        folder = writer.folder(ROUTER, MERGED)
        artifact = export_onnxruntime(
            one, folder, weights=stored.file, locations=stored.locations, contexts=tuple(frozen)
        )
        writer.add_variant(ROUTER, artifact, weights=stored.uri)
        done()
    dense = bytes_per_token(dynamic.graph)
    return {
        "checkpoint": file_digest(source.path),
        "tokenizers": tokenizers,
        "generation": _generation(source, frozen, trimmed),
        "cache": {
            context: {"bytes_per_token": bytes_per_token(each.model.graph), "dense_bytes_per_token": dense}
            for context, each in frozen.items()
            if dense
        },
        "shared_weights": not config.standalone,
        "parameters": {context: _parameters(accounts[context], frozen[context]) for context in frozen},
    }


def export_added(
    writer: BundleWriter,
    frozen: Mapping[str, Frozen],
    parameters: Mapping[str, Whole],
    added: Added,
    config: BuildConfig,
    sequence: int | None,
    progress: Progress,
) -> None:
    """Write the engines that need no others, of every context in each precision; `frozen` is not changed.

    parameters: those of all contexts.
    """
    for target, precision in added.independent:
        if target.flavour == CPU:
            steps = partial(progress, f"engines: {variant_name(precision)}")
            export_rounded(writer, frozen, parameters, dict.fromkeys(parameters, precision), precision, config, steps)
            continue
        for context, each in frozen.items():
            if target.flavour == CUDA:
                _export_cuda(writer, context, each.model, precision)
                continue
            name = plan_name(target, precision)
            model = each.model
            if precision in SCHEMES:
                model = model.clone()
                with naming_context(context, precision):
                    DequantizeWeights(precision, kept_of(each, parameters), parameters)(model)
            artifact = export_tensorrt(
                legal_for_plans(model, precision),
                writer.folder(context, name),
                target=target,
                precision=precision,
                ranges=added.ranges,
                sequence=sequence,
                progress=partial(progress, f"{context} {name}"),
            )
            writer.add_variant(context, artifact, weights=None)


def _export_cuda(writer: BundleWriter, context: str, frozen: ir.Model, precision: str) -> None:
    """Write a CUDA engine with its own weights, because the shared ones are in float32."""
    model = without_cache(frozen)
    for each in (InferShapes(), FoldGates()):
        each(model)
    if precision in HALVES:
        LowerPrecision(precision)(model)
    staging = writer.stage("weights")
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    large = [(name, tensor.numpy) for name, tensor in tensors.items() if tensor is not None and tensor.nbytes > INLINE]
    locations = write_weights(staging / WEIGHTS_FILE, large)
    uri = writer.add_asset(staging)
    folder = writer.folder(context, variant_name(precision, cuda=True))
    weights = writer.asset(uri) / WEIGHTS_FILE
    artifact = export_onnxruntime(model, folder, weights=weights, locations=locations, precision=precision, cuda=True)
    writer.add_variant(context, artifact, weights=uri)


def legal_for_plans(frozen: ir.Model, precision: str) -> ir.Model:
    """A copy that TensorRT accepts, in `precision`; tensors are shared, and converted when they are read.

    Around rounded weights it computes in float16. It gives all logits: plans have no inputs whose values determine
    shapes.
    """
    model = with_all_logits(frozen)
    for each in (InferShapes(), FoldGates(), LegalizeForTensorRT()):
        each(model)
    computes_in = "fp16" if precision in SCHEMES else precision
    if computes_in in HALVES:
        LowerPrecision(computes_in)(model)
    return model


def _generation(
    source: Source, contexts: Iterable[str], trimmed: Mapping[str, TrimmedVocabulary]
) -> dict[str, dict[str, Any]]:
    """What generates text with the engines of each context, in their own token ids."""
    if (whole := source.generation) is None:
        return {}
    new_ids = {c: {old: new for new, old in enumerate(own.kept.tolist())} for c, own in trimmed.items()}
    return {c: (whole.renumbered(new_ids[c]) if c in new_ids else whole).to_plain() for c in contexts}


def _parameters(accounting: Accounting, frozen: Frozen) -> dict[str, Any]:
    """The accounting in the form of bundle and report; `by_name` lists [total, kept] of every parameter."""
    # A mixture is named after the first parameter of its router.
    return {
        "removed_experts": {router.parameters[0]: list(router.removed) for router in frozen.routers if router.removed},
        "total": accounting.total,
        "kept": accounting.kept,
        "removed": accounting.removed,
        "removed_by_kind": accounting.removed_by_kind,
        "by_name": {name: [total, accounting.kept_by_name[name]] for name, total in accounting.total_by_name.items()},
    }

"""Frozen graphs -> weights, tokenizers and engines in a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from cpcompile.bundle.reader import ROUTER, TOKEN_IDS
from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.config import BuildConfig
from cpcompile.core.types import Progress
from cpcompile.exporters.onnxruntime_exporter import MERGED, export_onnxruntime, variant_name
from cpcompile.exporters.tensorrt_exporter import export_tensorrt
from cpcompile.exporters.tensorrt_exporter import variant_name as plan_name
from cpcompile.exporters.weights_file import INLINE, Location, write_weights
from cpcompile.files.whole_files import file_digest
from cpcompile.frontend.source import Source
from cpcompile.passes.cache_interface import bytes_per_token
from cpcompile.passes.derived_parameters import Derivation
from cpcompile.passes.equal_caches import with_equal_caches
from cpcompile.passes.fold_gates import FoldGates
from cpcompile.passes.freeze import Frozen
from cpcompile.passes.group_query_attention import GroupQueryAttention
from cpcompile.passes.infer_shapes import InferShapes
from cpcompile.passes.legalize_for_tensorrt import LegalizeForTensorRT
from cpcompile.passes.lower_precision import HALVES, LowerPrecision
from cpcompile.passes.merge_contexts import merge_contexts
from cpcompile.passes.quantize_dynamic import QuantizeDynamic
from cpcompile.passes.quantize_weights import QuantizeWeights
from cpcompile.passes.remove_cache import with_all_logits, without_cache
from cpcompile.passes.rotary_embedding import RotaryEmbedding
from cpcompile.passes.share_weights import KeptChannels, Run, ShareWeights, Whole, plan_runs
from cpcompile.passes.tied_head import TiedHead
from cpcompile.pipeline.accounting import Accounting
from cpcompile.targets.requests import CPU, CUDA, Added
from cpcompile.text.vocabulary import TrimmedVocabulary

WEIGHTS_FILE = "weights.bin"


def export_engines(
    writer: BundleWriter,
    dynamic: ir.Model,
    frozen: Mapping[str, Frozen],
    accounts: Mapping[str, Accounting],
    source: Source,
    trimmed: Mapping[str, TrimmedVocabulary],
    config: BuildConfig,
    done: Callable[[], None],
) -> dict[str, Any]:
    """Write weights, tokenizers and engines; returns the metadata that the bundle records.

    done: called after the weights and tokenizers, and after each engine.
    """
    whole = _wholes(dynamic, frozen, accounts)
    kept: dict[str, KeptChannels] = {}
    for context, each in frozen.items():
        kept[context] = {name: axes for name, axes in each.kept.items() if name in whole}
        if not config.standard_operators:
            kept[context] = _derive(TiedHead(kept[context], whole), each.model, kept[context], whole)
    stored = NOT_STORED if config.standalone else _share(writer, {c: f.model for c, f in frozen.items()}, kept, whole)
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
    for context, each in frozen.items():
        _export_for_cpu(writer, context, each.model, stored, config)
        done()
    if config.merged:
        one = merge_contexts(with_equal_caches({context: each.model for context, each in frozen.items()}))
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
    dynamic: ir.Model,
    frozen: Mapping[str, Frozen],
    accounts: Mapping[str, Accounting],
    added: Added,
    config: BuildConfig,
    sequence: int | None,
    progress: Progress,
) -> None:
    """Write engines of every context for every target in each precision that it can have; `frozen` is not changed."""
    for precision, target in product(added.precisions, added.targets):
        if precision not in target.precisions:
            continue
        if target.flavour == CPU:
            _export_quantized(writer, dynamic, frozen, accounts, precision, config, progress)
            continue
        for context, each in frozen.items():
            if target.flavour == CUDA:
                _export_cuda(writer, context, each.model, precision)
                continue
            name = plan_name(target, precision)
            artifact = export_tensorrt(
                legal_for_plans(each.model, precision),
                writer.folder(context, name),
                target=target,
                precision=precision,
                ranges=added.ranges,
                sequence=sequence,
                progress=partial(progress, f"{context} {name}"),
            )
            writer.add_variant(context, artifact, weights=None)


def _export_quantized(
    writer: BundleWriter,
    dynamic: ir.Model,
    frozen: Mapping[str, Frozen],
    accounts: Mapping[str, Accounting],
    precision: str,
    config: BuildConfig,
    progress: Progress,
) -> None:
    """Write an engine of every context whose weights are rounded; contexts share them in a file of their own."""
    whole = _wholes(dynamic, frozen, accounts)
    models: dict[str, ir.Model] = {}
    kept: dict[str, KeptChannels] = {}
    for context, each in frozen.items():
        models[context] = each.model.clone()
        own = {name: axes for name, axes in each.kept.items() if name in whole}
        kept[context] = _derive(quantize(precision, own, whole), models[context], own, whole)
    stored = NOT_STORED if config.standalone else _share(writer, models, kept, whole)
    name = variant_name(precision)
    for done, (context, model) in enumerate(models.items()):
        progress(f"plans: {name}", done, len(models))
        _export_for_cpu(writer, context, model, stored, config, precision)
    progress(f"plans: {name}", len(models), len(models))


def _export_for_cpu(
    writer: BundleWriter, context: str, model: ir.Model, stored: Stored, config: BuildConfig, precision: str = "fp32"
) -> None:
    """Write the engine of one context, in the operators that the build may use."""
    if not config.standard_operators:
        model = fused_for_cpu(model)
    folder = writer.folder(context, variant_name(precision))
    artifact = export_onnxruntime(model, folder, weights=stored.file, locations=stored.locations, precision=precision)
    writer.add_variant(context, artifact, weights=stored.uri)


def _derive(
    derive: ir.passes.InPlacePass, model: ir.Model, kept: KeptChannels, whole: dict[str, Whole]
) -> KeptChannels:
    """What `model` has of every parameter after the pass `derive`; those that it makes are added to `whole`."""
    result = derive(model)
    assert isinstance(result, Derivation)
    left = {name: axes for name, axes in kept.items() if name in model.graph.initializers}
    whole |= {name: each.whole for name, each in result.parameters.items()}
    return left | {name: each.kept for name, each in result.parameters.items()}


def quantize(precision: str, kept: KeptChannels, whole: Mapping[str, Whole]) -> ir.passes.InPlacePass:
    """The pass that rounds weights to `precision`."""
    if precision == "int8":
        return QuantizeDynamic(kept, whole)
    return QuantizeWeights(precision, kept, whole)


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


def fused_for_cpu(frozen: ir.Model) -> ir.Model:
    """A copy in operators that ONNX Runtime computes faster on the CPU; tensors are shared."""
    model = frozen.clone()
    for each in (CommonSubexpressionEliminationPass(), RotaryEmbedding(), GroupQueryAttention()):
        each(model)
    return model


def legal_for_plans(frozen: ir.Model, precision: str) -> ir.Model:
    """A copy that TensorRT accepts, in `precision`; tensors are shared, and converted when they are read.

    It gives all logits: plans have no inputs whose values determine shapes.
    """
    model = with_all_logits(frozen)
    for each in (InferShapes(), FoldGates(), LegalizeForTensorRT()):
        each(model)
    if precision in HALVES:
        LowerPrecision(precision)(model)
    return model


@dataclass(frozen=True)
class Stored:
    """A file of weights that engines share: the asset, the file in it, and where the tensors lie."""

    uri: str | None
    file: Path | None
    locations: Mapping[str, Location]


NOT_STORED = Stored(None, None, {})


def _share(
    writer: BundleWriter,
    models: Mapping[str, ir.Model],
    kept: Mapping[str, KeptChannels],
    whole: Mapping[str, Whole],
) -> Stored:
    """Write what the contexts have `kept` of the `whole` parameters once, and let the graphs `models` read that."""
    plan = plan_runs(kept, {name: whole[name].shape for channels in kept.values() for name in channels})
    runs = [run for runs in plan.values() for run in runs]
    staging = writer.stage("weights")
    pieces = ((run.stored_name, partial(_piece, whole[run.name], run)) for run in runs)
    locations = write_weights(staging / WEIGHTS_FILE, pieces)
    uri = writer.add_asset(staging)
    for context, model in models.items():
        ShareWeights(context, plan)(model)
    return Stored(uri, writer.asset(uri) / WEIGHTS_FILE, locations)


def _piece(whole: Whole, run: Run) -> npt.NDArray[np.generic]:
    """The elements of `run` as the engines read them."""
    return run.cut(whole.read())


def _wholes(dynamic: ir.Model, frozen: Mapping[str, Frozen], accounts: Mapping[str, Accounting]) -> dict[str, Whole]:
    """The parameters of all contexts by name, with their axes in the order of the engines."""
    permutations = {name: order for each in frozen.values() for name, order in each.permutations.items()}
    names = next(iter(accounts.values())).total_by_name
    return {
        name: Whole(_whole(dynamic, permutations, name).shape, partial(_whole, dynamic, permutations, name))
        for name in names
        if name in dynamic.graph.initializers
    }


def _whole(dynamic: ir.Model, permutations: Mapping[str, tuple[int, ...]], name: str) -> npt.NDArray[np.generic]:
    """The parameter `name` of all contexts, a view with its axes in the order of the engines."""
    tensor = dynamic.graph.initializers[name].const_value
    assert tensor is not None
    array = tensor.numpy()
    return array.transpose(permutations[name]) if name in permutations else array


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

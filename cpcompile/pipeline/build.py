"""The way of the data, on one page.

text per context -> Corpus -> trainer -> Checkpoint             or a Program of one's own, with gates
Checkpoint, Program -> capture (once) -> dynamic graph
dynamic graph x context -> freeze passes -> frozen graph         for every context
frozen graphs -> shared weights -> exporter -> bundle
frozen graphs x targets -> legal, in their precision -> exporters -> engines for GPUs in the bundle
bundle + eager models + held-out text -> validator -> report, verdict
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.bundle.reader import ROUTER, TOKEN_IDS, Bundle, BundleWriter, open_bundle
from cpcompile.core.config import ModelConfig, PretrainedConfig, TrainConfig, ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.exporters.onnxruntime_exporter import MERGED, SINGLE, cuda_variant, export_onnxruntime
from cpcompile.exporters.tensorrt_exporter import export_tensorrt, require_target, variant_name
from cpcompile.exporters.weights_file import INLINE, Location, write_weights
from cpcompile.files.whole_files import file_digest, require_file_path, whole_file
from cpcompile.frontend.checkpoint import Checkpoint
from cpcompile.frontend.source import Source, open_source, tokenizer_file
from cpcompile.machine.memory import NO_PRIVATE, PrivatePeak, environment, peak_resident_bytes, reset_peak
from cpcompile.partitioning.pretrained import read_pretrained
from cpcompile.passes.fold_gates import FoldGates
from cpcompile.passes.freeze import Frozen, freeze, prepare, used_sizes
from cpcompile.passes.infer_shapes import InferShapes
from cpcompile.passes.legalize_for_tensorrt import LegalizeForTensorRT
from cpcompile.passes.lower_precision import HALVES, LowerPrecision
from cpcompile.passes.merge_contexts import merge_contexts
from cpcompile.passes.share_weights import Run, ShareWeights, plan_runs
from cpcompile.pipeline.accounting import Accounting, account
from cpcompile.report import BuildResult, BuildStage, ContextResult, Report, build_of, make_report, write_report
from cpcompile.targets.requests import CUDA, NOTHING_ADDED, Added
from cpcompile.text.corpus import load_corpus
from cpcompile.text.vocabulary import TrimmedVocabulary
from cpcompile.training.branch import Observer
from cpcompile.training.trainer import require_outputs, train
from cpcompile.validation.diagnosis import diagnose
from cpcompile.validation.expected_graphs import FreshGraphs, order_rows
from cpcompile.validation.peers import open_peers
from cpcompile.validation.validator import VariantResult, validate

Progress = Callable[[str, int, int | None], None]
WEIGHTS_FILE = "weights.bin"
PARAMETERS = ("total", "kept", "removed", "removed_by_kind", "removed_experts")
"""What the report says of the parameters of a context."""


def train_from_data(
    data: Path,
    out: Path,
    source: ModelConfig | Path,
    config: TrainConfig,
    *,
    tokenizer: Path | None,
    text_field: str,
    cache: Path | None,
    resume: bool,
    held_out: bool,
    progress: Progress,
    observer: Observer,
) -> Checkpoint:
    """`cpcompile train`: text in `data` -> checkpoint `out`, and its dense baseline beside it.

    source: the shape of a model to train from scratch, or the folder of a pretrained one.
    """
    require_outputs(out)
    if out.resolve().is_relative_to(data.resolve()):
        raise UsageError(f"{out}: lies in {data}, where every file is text; choose another --out")
    pretrained = None
    model_config: ModelConfig | PretrainedConfig
    if isinstance(source, Path):
        progress("read the pretrained model", 0, 1)
        pretrained = read_pretrained(source)
        progress("read the pretrained model", 1, 1)
        model_config = pretrained.config
    else:
        model_config = source
    with tokenizer_file(pretrained.tokenizer if pretrained else None) as own_tokenizer:
        corpus = load_corpus(
            data,
            vocabulary=model_config.vocabulary,
            sequence=config.sequence,
            held_out_fraction=config.held_out_fraction,
            seed=config.seed,
            text_field=text_field,
            tokenizer=own_tokenizer or tokenizer,
            cache=cache,
            progress=progress,
        )
    if isinstance(model_config, ModelConfig):
        model_config = dataclasses.replace(model_config, vocabulary=corpus.vocabulary)
    return train(
        corpus,
        model_config,
        config,
        out,
        pretrained=pretrained.state if pretrained else None,
        resume=resume,
        held_out=held_out,
        observer=observer,
        progress=progress,
    )


def build_bundle(
    model: Path,
    out: Path,
    *,
    contexts: Sequence[str] | None,
    opset: int,
    standalone: bool,
    data: Path | None,
    config: ValidateConfig,
    progress: Progress,
    merged: bool = False,
    coverage: float | None = None,
    repro: Path | None = None,
    added: Added = NOTHING_ADDED,
) -> tuple[Report, Path]:
    """`cpcompile build`: checkpoint or program `model` -> bundle with its report; returns the report and where it is.

    `merged` adds one engine for all contexts. `coverage` is the part of a context's text that its vocabulary covers
    in the tokens that it had; None leaves the vocabulary whole. `added` says which engines for GPUs
    every context gets. A bundle that fails its validation does not replace an
    older one: it goes to `out`.failed, and minimal repros of what fails parity to the folder `repro`.
    """
    for target in added.targets:
        if target.flavour != CUDA:
            require_target(target)  # before the work begins
    stages = _Stages(progress)
    with stages("load"):
        source = open_source(model)
        chosen = source.choose(contexts)
        require_compatible(chosen, standalone=standalone, merged=merged, coverage=coverage)
        order, trimmed = source.trim(chosen, coverage) if coverage is not None else (None, {})
        reference = source.reference(config, data=data, trimmed=trimmed, progress=progress)
    with stages("capture"):
        dynamic = source.capture(opset=opset)
    with stages("freeze"):
        rows = order_rows(dynamic, source, order) if order is not None else None
        prepared, frozen, accounts = prepare(dynamic), {}, {}
        for context in chosen:
            tokens = rows[trimmed[context].kept].tolist() if rows is not None else None
            frozen[context] = freeze(prepared, source.contexts.index(context), tokens)
            used = partial(used_sizes, prepared)
            accounts[context] = _account(context, frozen[context], source, tokens and len(tokens), used)
    with BundleWriter(out) as writer:
        whole = {context: each.model.clone() for context, each in frozen.items()} if added.targets else {}
        with stages("export"):
            metadata = _export(writer, dynamic, frozen, accounts, source, trimmed, shared=not standalone, merged=merged)
        if whole:
            with stages("plans"):
                _export_added(writer, whole, added, source.sequence, progress)
        bundle = writer.seal(name=source.path.stem, metadata=metadata)
        build = stages.result()
        del whole
        del prepared, frozen  # validation needs the room
        with open_peers(config, source, reference) as peers:
            results = validate(bundle, reference, config, peers=peers, progress=progress)
        tokens = {context: rows[own.kept] for context, own in trimmed.items()} if rows is not None else {}
        graphs = FreshGraphs(source, lambda _: dynamic, tokens)
        results = diagnose(bundle, results, reference, graphs, repro, layers=config.layers)
        report = report_of(bundle, source, results, build, config)
        write_report(report, writer.root)
        return report, writer.commit(failed=report["verdict"] == "fail")


def require_compatible(contexts: Sequence[str], *, standalone: bool, merged: bool, coverage: float | None) -> None:
    """UsageError for settings of `build_bundle` that exclude each other."""
    if merged and standalone:
        raise UsageError("--merged is one engine whose weights all contexts share; leave out --standalone")
    if merged and coverage is not None:
        raise UsageError("--merged is one engine for all contexts, which have one vocabulary; leave it whole")
    if merged and len(contexts) < 2:
        raise UsageError(f"--merged joins several contexts, and there is only {contexts[0]}; leave it out")


def validate_bundle(
    path: Path,
    model: Path,
    *,
    data: Path | None,
    config: ValidateConfig,
    progress: Progress,
    repro: Path | None = None,
) -> Report:
    """`cpcompile validate`: measure the bundle `path` anew; what its build took stands in its report already.

    Minimal repros of what fails parity go to the folder `repro`.
    """
    bundle, source = open_with_model(path, model)
    trimmed = bundle.trimmed_vocabularies()
    reference = source.reference(config, data=data, trimmed=trimmed, progress=progress)
    with open_peers(config, source, reference) as peers:
        results = validate(bundle, reference, config, peers=peers, progress=progress)
    graphs = FreshGraphs(source, cache(lambda o: source.capture(opset=o)), {c: own.kept for c, own in trimmed.items()})
    results = diagnose(bundle, results, reference, graphs, repro, layers=config.layers)
    return report_of(bundle, source, results, build_of(path), config)


def open_with_model(path: Path, model: Path) -> tuple[Bundle, Source]:
    """The bundle `path`, intact, and the model that it was built from; UsageError if it was built from another."""
    bundle = open_bundle(path)
    bundle.verify_all()
    if not model.exists():
        raise UsageError(f"{model}: there is no such file; --model names the model that {path} was built from")
    source = open_source(model)
    if file_digest(model) != bundle.metadata["checkpoint"]:
        raise UsageError(f"{path}: was not built from {model}; give its own model with --model, or build it again")
    return bundle, source


def export_standalone(path: Path, context: str, out: Path, *, variant: str) -> None:
    """`cpcompile export`: one self-contained ONNX file of one engine of the bundle `path`."""
    bundle = open_bundle(path)
    if require_file_path(out, ".onnx").is_relative_to(bundle.root.resolve()):
        raise UsageError(f"{out}: lies in the bundle; choose another --out")
    chosen = bundle.variant(context, variant)
    bundle.verify_engine(chosen)
    with whole_file(out) as temporary:
        ir.save(chosen.standalone(), temporary, format="protobuf")


def _account(
    context: str, frozen: Frozen, source: Source, tokens: int | None, used: Callable[[], Mapping[str, int]]
) -> Accounting:
    total = source.parameter_sizes()
    return account(
        context,
        frozen.model.graph,
        total=total,
        expected=source.kept_sizes(context, tokens),
        kinds={name: kind for name in total if (kind := source.parameter_kind(name)) is not None},
        used=used,
    )


def _export(
    writer: BundleWriter,
    dynamic: ir.Model,
    frozen: Mapping[str, Frozen],
    accounts: Mapping[str, Accounting],
    source: Source,
    trimmed: Mapping[str, TrimmedVocabulary],
    *,
    shared: bool,
    merged: bool,
) -> dict[str, Any]:
    """Write weights, tokenizers and engines; returns what the bundle records of them."""
    uri: str | None = None
    locations: Mapping[str, Location] = {}
    if shared:
        parameters = next(iter(accounts.values())).total_by_name
        permutations = {n: order for f in frozen.values() for n, order in f.permutations.items()}
        plan = plan_runs(
            {c: {n: kept for n, kept in f.kept.items() if n in parameters} for c, f in frozen.items()},
            {name: _whole(dynamic, permutations, name).shape for name in parameters},
        )
        runs = [run for runs in plan.values() for run in runs]
        staging = writer.stage("weights")
        locations = write_weights(
            staging / WEIGHTS_FILE, ((run.stored_name, partial(_stored, dynamic, permutations, run)) for run in runs)
        )
        uri = writer.add_asset(staging)
        for context in frozen:
            ShareWeights(context, plan)(frozen[context].model)
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
    weights = writer.asset(uri) / WEIGHTS_FILE if uri else None
    for context in frozen:
        folder = writer.folder(context, SINGLE)
        artifact = export_onnxruntime(frozen[context].model, folder, weights=weights, locations=locations)
        writer.add_variant(context, artifact, weights=uri)
    if merged:
        one = merge_contexts({context: frozen[context].model for context in frozen})
        folder = writer.folder(ROUTER, MERGED)
        artifact = export_onnxruntime(one, folder, weights=weights, locations=locations, contexts=tuple(frozen))
        writer.add_variant(ROUTER, artifact, weights=uri)
    return {
        "checkpoint": file_digest(source.path),
        "tokenizers": tokenizers,
        "shared_weights": shared,
        "parameters": {context: _parameters(accounts[context], frozen[context]) for context in frozen},
    }


def _export_added(
    writer: BundleWriter,
    frozen: Mapping[str, ir.Model],
    added: Added,
    sequence: int | None,
    progress: Progress,
) -> None:
    """An engine of every context for every target in every precision; `frozen` stays as it is."""
    for context, precision, target in product(frozen, added.precisions, added.targets):
        if target.flavour == CUDA:
            _export_cuda(writer, context, frozen[context], precision)
            continue
        name = variant_name(target, precision)
        artifact = export_tensorrt(
            legal_for_plans(frozen[context], precision),
            writer.folder(context, name),
            target=target,
            precision=precision,
            ranges=added.ranges,
            sequence=sequence,
            progress=partial(progress, f"{context} {name}"),
        )
        writer.add_variant(context, artifact, weights=None)


def _export_cuda(writer: BundleWriter, context: str, frozen: ir.Model, precision: str) -> None:
    """With weights of its own: those of the other engines are in float32."""
    model = frozen.clone()
    for each in (InferShapes(), FoldGates()):
        each(model)
    if precision in HALVES:
        LowerPrecision(precision)(model)
    staging = writer.stage("weights")
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    large = [(name, tensor.numpy) for name, tensor in tensors.items() if tensor is not None and tensor.nbytes > INLINE]
    locations = write_weights(staging / WEIGHTS_FILE, large)
    uri = writer.add_asset(staging)
    folder = writer.folder(context, cuda_variant(precision))
    weights = writer.asset(uri) / WEIGHTS_FILE
    artifact = export_onnxruntime(model, folder, weights=weights, locations=locations, cuda_precision=precision)
    writer.add_variant(context, artifact, weights=uri)


def legal_for_plans(frozen: ir.Model, precision: str) -> ir.Model:
    """A copy that TensorRT takes, in `precision`; tensors are shared, and converted when they are read."""
    model = frozen.clone()
    for each in (InferShapes(), FoldGates(), LegalizeForTensorRT()):
        each(model)
    if precision in HALVES:
        LowerPrecision(precision)(model)
    return model


def _stored(dynamic: ir.Model, permutations: Mapping[str, tuple[int, ...]], run: Run) -> npt.NDArray[np.generic]:
    """The elements of `run` as the engines read them."""
    return run.cut(_whole(dynamic, permutations, run.name))


def _whole(dynamic: ir.Model, permutations: Mapping[str, tuple[int, ...]], name: str) -> npt.NDArray[np.generic]:
    """The parameter `name` of all contexts, a view with its axes in the order of the engines."""
    tensor = dynamic.graph.initializers[name].const_value
    assert tensor is not None
    array = tensor.numpy()
    return array.transpose(permutations[name]) if name in permutations else array


def _parameters(accounting: Accounting, frozen: Frozen) -> dict[str, Any]:
    """The accounting as bundle and report state it; `by_name` lists [total, kept] of every parameter."""
    # A mixture goes by the first parameter of its router.
    return {
        "removed_experts": {router.parameters[0]: list(router.removed) for router in frozen.routers if router.removed},
        "total": accounting.total,
        "kept": accounting.kept,
        "removed": accounting.removed,
        "removed_by_kind": accounting.removed_by_kind,
        "by_name": {name: [total, accounting.kept_by_name[name]] for name, total in accounting.total_by_name.items()},
    }


def report_of(
    bundle: Bundle, source: Source, results: Sequence[VariantResult], build: BuildResult, config: ValidateConfig
) -> Report:
    """`results` of the engines of `bundle`, and what its build took."""
    parameters = bundle.metadata["parameters"]
    return make_report(
        model={"name": bundle.name, "architecture": source.architecture, "config": dict(source.config)},
        environment=environment(),
        build=build,
        bundle_bytes=bundle.bytes,
        dense_bytes=source.dense_bytes,
        shared_weights=bundle.metadata["shared_weights"],
        contexts=[
            ContextResult(
                name=context,
                parameters={k: parameters[context][k] for k in PARAMETERS},
                variants=[result for result in results if result.context == context],
            )
            for context in bundle.contexts
        ],
        selection=source.selection,
        training=source.training,
        max_perplexity_increase=config.max_perplexity_increase if source.has_text else None,
    )


class _Stages:
    """Names, times and peak memory of the stages of a build."""

    def __init__(self, progress: Progress) -> None:
        reset_peak()  # a process that has trained before starts from what it holds now
        self._progress = progress
        self._stages: list[BuildStage] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._progress(name, 0, 1)
        started = time.perf_counter()
        with PrivatePeak() as private:
            yield
        self._stages.append(
            BuildStage(
                name=name,
                seconds=time.perf_counter() - started,
                peak_rss_bytes=peak_resident_bytes(),
                peak_private_bytes=private.bytes,
            )
        )
        self._progress(name, 1, 1)

    def result(self) -> BuildResult:
        """Of the stages so far."""
        private = [stage.peak_private_bytes for stage in self._stages if stage.peak_private_bytes is not None]
        return BuildResult(
            seconds=sum(stage.seconds for stage in self._stages),
            peak_rss_bytes=peak_resident_bytes(),
            peak_private_bytes=max(private, default=None),
            stages=tuple(self._stages),
            not_measured={} if private else {"peak_private_bytes": NO_PRIVATE},
        )

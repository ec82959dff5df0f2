"""The data flow of a build, on one page.

text per context -> Corpus -> trainer -> Checkpoint             or your own Program, with gates
Checkpoint, Program -> capture (once) -> dynamic graph
dynamic graph x context -> freeze passes -> frozen graph         for every context
frozen graphs -> shared weights -> fused for the CPU -> exporter -> bundle
frozen graphs x targets -> legal, in their precision -> exporters -> engines for GPUs in the bundle
frozen graphs x precisions -> search -> the fastest engines that keep the quality budget, in the bundle
bundle + eager models + held-out text -> validator -> report, verdict
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.config import ROUNDED, BuildConfig, ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.paths import calibration_path, dense_path
from cpcompile.core.rounding import UNCALIBRATED
from cpcompile.core.types import Progress, unwatched
from cpcompile.exporters.tensorrt_exporter import require_target
from cpcompile.frontend.calibration import require_precisions
from cpcompile.frontend.source import Source, TrainedSource, open_source
from cpcompile.passes.dequantize_weights import OPSET as BLOCKS_OPSET
from cpcompile.passes.freeze import Frozen, freeze, prepare, used_sizes
from cpcompile.pipeline.accounting import Accounting, account
from cpcompile.pipeline.cpu_engines import export_rounded
from cpcompile.pipeline.jobs import compare_in_processes
from cpcompile.pipeline.search import Search, require_search_text
from cpcompile.pipeline.stages import Stages
from cpcompile.pipeline.stored_weights import wholes
from cpcompile.pipeline.up_to_date import REQUEST, TEXT, conditions_of, kept_results, request_of
from cpcompile.pipeline.validate import not_validated, report_of, training_of
from cpcompile.pipeline.write_engines import export_added, export_engines
from cpcompile.report import Report, write_report
from cpcompile.targets.requests import FLAVOURS, Added, parse_targets
from cpcompile.text.vocabulary import TrimmedVocabulary
from cpcompile.validation.diagnosis import diagnose
from cpcompile.validation.expected_graphs import FreshGraphs, order_calibration, order_rows
from cpcompile.validation.language_reference import LanguageReference
from cpcompile.validation.open_reference import open_reference
from cpcompile.validation.peers import open_peers
from cpcompile.validation.validator import validate


def build_bundle(
    model: Path,
    out: Path,
    config: BuildConfig,
    validation: ValidateConfig,
    *,
    progress: Progress,
    data: Path | None = None,
    repro: Path | None = None,
    keep: bool = True,
) -> tuple[Report, Path]:
    """Build a bundle with its report from the checkpoint or program `model`; returns the report and the bundle's path.

    data: the corpus whose held-out text is used instead of what `model` brings. A bundle that fails its validation does
    not replace an older one: it goes to `out`.failed, and minimal repros of what fails parity to the folder `repro`.
    keep: whether engines that the older one has as well keep their results.
    """
    added = parse_targets(config.targets, config.precisions, config.profiles, config.search_seconds)
    for target in added.targets:
        if target.flavour in FLAVOURS:
            require_target(target)  # before the work begins
    stages, writer = Stages(progress), BundleWriter(out)
    with stages("load"):
        source = open_source(model)
        require_rounding(source, added, config.opset)
        require_baseline(source, added)
        training = training_of(source)
        chosen, coverage = source.choose(config.contexts), config.vocabulary_coverage
        config.require_compatible(chosen)
        order, trimmed = source.trim(chosen, coverage) if coverage is not None else (None, {})
        calibration = source.calibration if added.rounded else UNCALIBRATED
        require_precisions(calibration, added.rounded, calibration_path(model))
        reference = open_reference(
            source, validation, data=data, trimmed=trimmed, progress=progress, calibration=calibration
        )
        if added.candidates:
            assert isinstance(reference, LanguageReference)  # models that read no text were refused
            require_search_text(reference, chosen)
    with stages("capture"):
        dynamic = source.capture(opset=config.opset)
    with stages("freeze", len(chosen)) as done:
        rows = order_rows(dynamic, source, order) if order is not None else None
        frozen, accounts = freeze_contexts(source, dynamic, chosen, trimmed, rows, done)
    if rows is not None:
        calibration = order_calibration(calibration, source, rows)
    parameters = wholes(dynamic, frozen, accounts, calibration)
    with writer:
        with stages("export", 1 + len(chosen) + config.merged) as done:
            metadata = export_engines(
                writer, dynamic, frozen, parameters, accounts, source, trimmed, config, done, added
            )
        if added.independent:
            with stages("engines"):
                export_added(writer, frozen, parameters, added, config, source.sequence, progress)
        record = None
        if added.candidates:
            assert isinstance(reference, LanguageReference)
            with stages("search"):
                folder = writer.stage("search")
                with Search(folder, frozen, parameters, reference, metadata, config, validation, progress) as search:
                    best = search.best(added.candidates, added.openvino_candidates)
            if best.schemes:
                export_rounded(writer, frozen, parameters, best.schemes, best.precision, config, unwatched)
            metadata["best"], record = best.variant, best.record
        request = request_of(model, config, validation, data)
        metadata |= {REQUEST: request, TEXT: reference.digest}
        bundle = writer.seal(name=source.path.stem, metadata=metadata)
        build = replace(stages.result(), search=record)
        del frozen  # validation needs the memory
        tokens = {context: rows[own.kept] for context, own in trimmed.items()} if rows is not None else {}
        graphs = FreshGraphs(source, lambda _: dynamic, tokens)
        conditions = None
        if config.validate:
            conditions = conditions_of(request["dense baseline"], reference.digest, validation)
            kept = kept_results(writer.target, bundle, conditions) if keep else {}
            compared = compare_in_processes(bundle, model, validation, data=data, kept=kept, progress=progress)
            with open_peers(validation, source, reference, graphs) as peers:
                results = validate(
                    bundle, reference, validation, peers=peers, kept=kept, compared=compared, progress=progress
                )
            results = diagnose(bundle, results, reference, graphs, repro, layers=validation.layers, progress=progress)
        else:
            results = not_validated(bundle)
        report = report_of(bundle, source, results, build, validation, training, conditions)
        write_report(report, writer.root)
        return report, writer.commit(failed=report.verdict == "fail")


def require_baseline(source: Source, added: Added) -> None:
    """UsageError if `added` is searched for, and there is nothing to compare quality with."""
    if added.candidates and isinstance(source, TrainedSource) and source.dense is None:
        raise UsageError(
            f"{source.path}: --target best compares the quality of engines with the dense baseline, and there is no "
            f"{dense_path(source.path).name} beside it; put it there, or name a precision with --target cpu"
        )


def require_rounding(source: Source, added: Added, opset: int) -> None:
    """UsageError if `added` has engines whose weights are rounded, which `source` or `opset` cannot have."""
    if added.rounded and not source.has_text:
        raise UsageError(
            f"{source.path}: --target cpu and best, and --precision {added.rounded[0]}, round the weights of language "
            "models; this model reads no text, and its engines could not be validated. Omit them"
        )
    plans = {each for target in added.targets if target.flavour in FLAVOURS for each in added.precisions_of(target)}
    if opset < BLOCKS_OPSET and plans & set(ROUNDED):
        raise UsageError(
            f"--precision {added.rounded[0]} of TensorRT-RTX needs opset {BLOCKS_OPSET} or later; omit --opset {opset}"
        )


def freeze_contexts(
    source: Source,
    dynamic: ir.Model,
    contexts: Sequence[str],
    trimmed: Mapping[str, TrimmedVocabulary],
    rows: npt.NDArray[np.int64] | None,
    done: Callable[[], None],
) -> tuple[dict[str, Frozen], dict[str, Accounting]]:
    """The graph of each context, and what it keeps of every parameter; `done` is called after each.

    rows: where `dynamic` has each token of the vocabulary, if those in `trimmed` are cut.
    """
    prepared, frozen, accounts = prepare(dynamic), {}, {}
    used = partial(used_sizes, prepared)
    for context in contexts:
        tokens = rows[trimmed[context].kept].tolist() if rows is not None else None
        frozen[context] = freeze(prepared, source.contexts.index(context), tokens)
        accounts[context] = _account(context, frozen[context], source, tokens and len(tokens), used, dynamic)
        done()
    return frozen, accounts


def _account(
    context: str,
    frozen: Frozen,
    source: Source,
    tokens: int | None,
    used: Callable[[], Mapping[str, int]],
    dynamic: ir.Model,
) -> Accounting:
    total = source.parameter_sizes()
    kinds: dict[str, str] = {name: kind for name in total if (kind := source.parameter_kind(name)) is not None}
    return account(
        context,
        frozen.model.graph,
        total=total,
        expected=source.kept_sizes(context, tokens),
        kinds=kinds | dict.fromkeys(source.unused, "unused"),
        used=used,
        dynamic=dynamic.graph,
    )

"""`cpcompile validate`: measure a bundle again."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

from cpcompile.bundle.reader import Bundle
from cpcompile.core.config import MIXED, ROUNDED, ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.json_form import from_json
from cpcompile.core.types import Progress
from cpcompile.frontend.source import Source
from cpcompile.machine.environment import environment
from cpcompile.pipeline.jobs import compare_in_processes
from cpcompile.pipeline.references import open_with_model, reference_of
from cpcompile.pipeline.up_to_date import Digests, conditions_of, dense_digest
from cpcompile.report import (
    BuildResult,
    ContextResult,
    ModelInfo,
    ParameterCounts,
    Report,
    TrainingSummary,
    make_report,
    read_build,
    summarize_training,
)
from cpcompile.report.results import Results, VariantResult
from cpcompile.validation.diagnosis import diagnose
from cpcompile.validation.expected_graphs import FreshGraphs
from cpcompile.validation.peers import open_peers
from cpcompile.validation.validator import validate

NOT_VALIDATED = "built, not validated: `cpcompile validate` measures it"
PARAMETERS = tuple(each.name for each in dataclasses.fields(ParameterCounts))


def validate_bundle(
    path: Path,
    model: Path,
    *,
    data: Path | None,
    config: ValidateConfig,
    progress: Progress,
    repro: Path | None = None,
) -> Report:
    """`cpcompile validate`: measure the bundle `path` again; the build result is taken from its report.

    Minimal repros of what fails parity go to the folder `repro`.
    """
    bundle, source = open_with_model(path, model, progress)
    training = training_of(source)
    reference = reference_of(bundle, source, config, data=data, progress=progress)
    tokens = {context: ids for context in bundle.contexts if (ids := bundle.token_ids(context)) is not None}
    graphs = FreshGraphs(source, cache(lambda o: source.capture(opset=o)), tokens)
    compared = compare_in_processes(bundle, model, config, data=data, progress=progress)
    with open_peers(config, source, reference, graphs) as peers:
        results = validate(bundle, reference, config, peers=peers, compared=compared, progress=progress)
    results = diagnose(bundle, results, reference, graphs, repro, layers=config.layers, progress=progress)
    conditions = conditions_of(dense_digest(model), reference.digest, config)
    return report_of(bundle, source, results, read_build(path), config, training, conditions)


def training_of(source: Source) -> TrainingSummary | None:
    """The training summary of `source`; UsageError if its record is malformed, before the work begins."""
    if source.training is None:
        return None
    try:
        return summarize_training(source.training, source.contexts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{source.path}: its training record is malformed ({error}); train it again") from error


def report_of(
    bundle: Bundle,
    source: Source,
    results: Results,
    build: BuildResult,
    config: ValidateConfig,
    training: TrainingSummary | None,
    conditions: Digests | None = None,
) -> Report:
    """The report on `bundle` from the `results` of its engines under `conditions`, and the result of its build."""
    parameters = bundle.metadata["parameters"]
    return make_report(
        model=ModelInfo(name=bundle.name, architecture=source.architecture, config=dict(source.config)),
        environment=environment(),
        build=build,
        bundle_bytes=bundle.bytes,
        dense_bytes=source.dense_bytes,
        shared_weights=bundle.metadata["shared_weights"],
        contexts=[
            ContextResult(
                name=context,
                parameters=from_json(ParameterCounts, {name: parameters[context][name] for name in PARAMETERS}),
                variants=results[context],
                cache=bundle.cache(context),
            )
            for context in bundle.contexts
        ],
        selection=source.selection,
        training=training,
        max_perplexity_increase=config.max_perplexity_increase if source.has_text else None,
        stored_once=_stored_once(bundle),
        conditions=conditions,
    )


def not_validated(bundle: Bundle) -> Results:
    """The results of engines that were only built."""
    return {
        context: tuple(
            VariantResult.not_run(
                name=variant.name,
                runtime=variant.runtime,
                precision=variant.precision,
                status="built",
                reason=NOT_VALIDATED,
                bytes=variant.bytes,
            )
            for variant in bundle.variants(context)
        )
        for context in bundle.contexts
    }


def _stored_once(bundle: Bundle) -> int:
    """By how many bytes the shares of quantised engines in their weights exceed the files of these weights."""
    rounded = [v for c in bundle.contexts for v in bundle.variants(c) if v.precision in (*ROUNDED, MIXED) and v.weights]
    shares = sum(variant.bytes - variant.model.stat().st_size for variant in rounded)
    files = {path for variant in rounded if variant.weights for path in variant.weights.iterdir()}
    return shares - sum(path.stat().st_size for path in files)

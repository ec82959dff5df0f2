"""`cpcompile check`: measure a bundle or an ONNX file now, and judge it against a baseline (`cpcompile.check`).

    bundle + model -> validator -> snapshot ┐
    bundle alone -> sizes, counts, placement┼ x baseline -> outcomes -> values that noise may explain are measured again
    two ONNX files -> compare -> snapshots  ┘

An ONNX file has one place; its baseline is another file, which is measured along with it and has a speed ratio of 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from cpcompile.bundle.reader import Bundle, Variant, open_bundle
from cpcompile.check.baseline import (
    BUNDLE,
    MEASURED_AGAIN,
    UNKNOWN,
    Judged,
    Measured,
    Snapshot,
    Value,
    measured_of,
    require_same_model,
    snapshot_of,
)
from cpcompile.check.criteria import NEEDS_MODEL, Check, differences, doubtful, judge
from cpcompile.core.check_config import CheckConfig
from cpcompile.core.coercion import require
from cpcompile.core.config import ValidateConfig
from cpcompile.core.json_form import to_json
from cpcompile.core.types import Feeds, Progress
from cpcompile.files.onnx_file import Size
from cpcompile.machine.environment import environment
from cpcompile.machine.noise import watch_machine
from cpcompile.pipeline.compare import NO_SPEED, FileComparison, compare_models, time_models
from cpcompile.pipeline.jobs import compare_in_processes
from cpcompile.pipeline.references import open_with_model, reference_of
from cpcompile.pipeline.validate import report_of, training_of
from cpcompile.report import read_build
from cpcompile.report.results import Placement, ratio_with_bounds
from cpcompile.runtime.engine import create_session, session_options
from cpcompile.validation.placement import measure_placement
from cpcompile.validation.random_inputs import RandomInputs
from cpcompile.validation.validator import measure_again, validate


def check_bundle(
    path: Path,
    model: Path | None,
    before: Snapshot | None,
    *,
    baseline: Path,
    data: Path | None,
    config: CheckConfig,
    validation: ValidateConfig | None = None,
    speed: bool = True,
    memory: bool = True,
    progress: Progress,
) -> tuple[Snapshot, Check]:
    """Measure the bundle `path` and judge it against `before`, which is in the file `baseline`.

    Without `before` there is nothing to judge: the snapshot will become the baseline. model: None skips what cannot be
    measured without it; a file that does not exist is the reason why it is not measured, and no reason for a baseline
    without it (UsageError). validation: shapes, threads and tolerance of the measurements.
    """
    waived = (() if model else NEEDS_MODEL) + (() if speed else ("speed_ratio",))
    waived += () if memory else ("memory", "private_memory")
    if model is None or not model.exists():
        require(
            before is not None or model is None,
            f"{model}: there is no such file, and no check would judge parity or quality against this baseline; give "
            "--model, or --without-model if that is intended",
        )
        bundle = open_bundle(path)
        bundle.verify_all()
        if before:
            require_same_model(before, baseline, architecture="", contexts=bundle.contexts)
        reason = f"{model}: there is no such file; --model names it" if model else "asked for with --without-model"
        now = _without_model(bundle, reason, before)
        return now, _judged(path, baseline, before, now, config, waived)
    bundle, source = open_with_model(path, model, progress)
    if before:
        require_same_model(before, baseline, architecture=source.architecture, contexts=bundle.contexts)
    rounds = config.rounds if before else 2 * config.rounds
    settings = dataclasses.replace(
        validation or ValidateConfig(),
        rounds=rounds,
        speed=speed,
        memory=memory,
        coherence=False,
        layers=False,
        min_speed_ratio=0.0,
    )
    reference = reference_of(bundle, source, settings, data=data, progress=progress)
    compared = compare_in_processes(bundle, model, settings, data=data, progress=progress)
    with watch_machine() as machine:
        results = validate(bundle, reference, settings, compared=compared, progress=progress)
    now = snapshot_of(report_of(bundle, source, results, read_build(path), settings, training_of(source)))
    check = _judged(path, baseline, before, now, config, waived)
    if before is None and speed and machine.interference:
        note = f"speed was measured while {machine.interference}; write the baseline again on a quiet machine"
        return now, dataclasses.replace(check, notes=(note,))
    for _ in range(config.attempts if before else 0):
        rounds *= 2
        for (context, variant), missed in doubtful(check.outcomes, MEASURED_AGAIN).items():
            steps = partial(progress, f"measure {context} {variant} again")
            only = dataclasses.replace(
                settings, rounds=rounds, speed="speed_ratio" in missed, memory=missed != {"speed_ratio"}
            )
            engine = bundle.variant(context, variant)
            timed, peaks, interference = measure_again(bundle, engine, reference, only, steps)
            now = now.again((context, variant), measured_of(speed=timed, memory=peaks), interference)
        check = _judged(path, baseline, before, now, config, waived)
    return now, check


def check_file(
    candidate: Path,
    baseline: Path,
    *,
    config: CheckConfig,
    inputs: Sequence[Feeds] = (),
    speed: bool = True,
    progress: Progress = lambda *_: None,
) -> Check:
    """Judge an ONNX file against an older one: outputs, also on `inputs`, sizes and the ratio of their speeds."""
    rounds, waived = config.rounds, () if speed else ("speed_ratio",)
    with watch_machine() as machine:
        found = compare_models(baseline, candidate, inputs=inputs, rounds=rounds if speed else None, progress=progress)
    before, now = _file_snapshots(found, machine.interference)
    outcomes = judge(before, now, config, waived=waived)
    for _ in range(config.attempts):
        if not doubtful(outcomes, MEASURED_AGAIN):
            break
        rounds *= 2
        with watch_machine() as machine:
            speeds = time_models(baseline, candidate, inputs, rounds, steps=partial(progress, "time again"))
            again = dataclasses.replace(found, speed=speeds)
        before, now = _file_snapshots(again, machine.interference)
        outcomes = judge(before, now, config, waived=waived)
    return Check(subject=str(candidate), baseline=str(baseline), environment=to_json(environment()), outcomes=outcomes)


def _judged(
    path: Path, baseline: Path, before: Snapshot | None, now: Snapshot, config: CheckConfig, waived: Sequence[str]
) -> Check:
    return Check(
        subject=str(path),
        baseline=str(baseline),
        environment=now.environment,
        outcomes=judge(before or now, now, config, waived=waived),
        notes=differences(before, now) if before else (),
    )


def _without_model(bundle: Bundle, reason: str, before: Snapshot | None) -> Snapshot:
    """A snapshot of the bundle alone: sizes, counts and placement. The facts about the model are the baseline's."""
    missing = dict.fromkeys(NEEDS_MODEL, reason)
    places = {BUNDLE: Measured(values={"bundle_bytes": Value(value=bundle.bytes)})}
    for context in bundle.contexts:
        kept = bundle.metadata["parameters"][context]["kept"]
        places[context, ""] = Measured(values={"parameters": Value(value=kept)})
        for variant in bundle.variants(context):
            measured = measured_of(size=variant.bytes, placement=_placement_on_random_inputs(variant))
            not_measured = {**missing, **measured.not_measured}
            places[context, variant.name] = dataclasses.replace(measured, not_measured=not_measured)
    return Snapshot(
        model=before.model if before else bundle.name,
        architecture=before.architecture if before else UNKNOWN,
        config=before.config if before else {},
        environment=to_json(environment()),
        places=places,
    )


def _placement_on_random_inputs(variant: Variant) -> Placement:
    if not variant.provider:  # it has no nodes that could be placed
        return measure_placement(variant, {})
    try:
        feeds = next(iter(RandomInputs(create_session(variant, session_options(variant)), variant.graph())))
        return measure_placement(variant, {name: array for name, array in feeds.items() if name not in variant.feeds})
    except StopIteration:
        return Placement.without("inputs of its types cannot be drawn")
    except Exception as error:  # onnxruntime has no common error class
        return Placement.without(f"the engine refuses random inputs: {error}")


def _file_snapshots(found: FileComparison, interference: str | None) -> tuple[Snapshot, Snapshot]:
    """The original and the candidate as a check compares them."""
    now = {}
    for shape in found.speed.shapes or ():
        if bounded := ratio_with_bounds(shape):
            ratio, low, high = bounded
            now["speed_ratio"] = Value(value=ratio, low=low, high=high, interference=interference)
    reason = found.speed.not_measured.get("shapes", NO_SPEED)
    return (
        _file_snapshot(found.original, {"speed_ratio": Value(value=1.0)}, ("pass", None), reason),
        _file_snapshot(found.candidate, now, (found.outputs.verdict, found.outputs.reason), reason),
    )


def _file_snapshot(
    size: Size, ratio: Mapping[str, Value], parity: tuple[Judged, str | None], no_ratio: str
) -> Snapshot:
    sizes = {name: Value(value=number) for name, number in vars(size).items()}
    measured = Measured(values={**sizes, **ratio}, verdicts={"parity": parity}, not_measured={"speed_ratio": no_ratio})
    return Snapshot(model="", architecture="onnx", config={}, environment={}, places={BUNDLE: measured})

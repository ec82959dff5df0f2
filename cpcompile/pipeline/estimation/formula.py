"""Peak resident memory of a build, stage by stage, from facts about a model and what the libraries take.

With M bytes of weights in T tensors, D bytes of the dense baseline, K of the largest engine (with its head twice if it
is tied to the embedding), n positions per run and V logits per position:

    load       L + M + P T                          weights are in memory once; P: a pretrained model is traced
    build      L + M + (P + G) T + R                graphs share the weights; R: the vocabulary in a new order
    parity     L'+ M + (P + G) T + R + K + 2M + W(16 n V)     float64; logits in float32, float64 and of the engine
    quality    L'+ M + (P + G) T + R + K + D + W(4 n' V) + 24 s V   windows of s tokens in float64, three arrays
               with --jobs j: L'+ M + (P + G) T + R here, and j times the larger of both, without G T and R, beside it
    timing     L'+ M + (P + G) T + R + K + D + D' + W(4 n V)     D': the dense baseline in ONNX Runtime
    measuring  L'+ M + (P + G) T + R + D  in this process, and next to it the larger of
               engine  E + K + W(4 n V)             eager  A + D + W(4 n V)

L, L', E, A are measured each time (`libraries`). W(x) = x + min(4 x, HEAP) is what results of x bytes take with
the activations that they are made of: glibc serves arrays below 32 MB from the heap, where holes remain, and maps
larger ones, which go back at once (mallopt(3), M_MMAP_THRESHOLD). G, P and HEAP were measured, by
`benchmarks/memory_estimate.py`, on models of 24 to 332 tensors and 0.2 to 135 million parameters: correct
them if its table shows more than 20 %.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpcompile.core.config import DENSE_PEER, BuildConfig, ValidateConfig
from cpcompile.pipeline.estimation.duration import build_seconds, in_words, validation_seconds
from cpcompile.pipeline.estimation.facts import Facts
from cpcompile.pipeline.estimation.libraries import Libraries
from cpcompile.validation.coherence import NEW_TOKENS, PROMPT_TOKENS, PROMPTS
from cpcompile.validation.quality import BATCH

GRAPH = 450_000
"""G: bytes of graphs per tensor, with all contexts frozen."""
TRACE = 250_000
"""P: bytes per tensor of the trace that finds the groups of a pretrained model."""
HEAP = 64_000_000
"""Bytes that activations leave in the heap."""
BESIDE, JOBS = "process beside it", "processes of --jobs"
ENGINE_GRAPH = 1_200
"""Bytes of an engine's file per tensor."""
NOT_COUNTED = (f"peers of --peers but {DENSE_PEER}", "text that --data reads")


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """The shape of one run of an engine."""

    batch: int = 1
    sequence: int = 128

    @property
    def positions(self) -> int:
        """Tokens of one run."""
        return self.batch * self.sequence


ONE_SEQUENCE = RunShape()


@dataclass(frozen=True)
class Stage:
    """Resident bytes at the peak of a stage."""

    name: str
    parts: Mapping[str, int]
    """Bytes by purpose, without zeros."""

    @property
    def peak_rss_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Process:
    """Peak resident bytes of a process of its own."""

    load_peak_rss_bytes: int
    run_peak_rss_bytes: int
    """Peak with the requested batch and sequence."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimate of a build."""

    build: tuple[Stage, ...]
    """The stages that the report counts as the build."""
    validation: tuple[Stage, ...]
    engines: Mapping[str, Process]
    eager: Process | None
    """Peaks of the dense baseline or the program; None if there is neither."""
    bundle_bytes: int
    build_seconds: float | None = None
    validation_seconds: float | None = None
    """The time of each on this machine; None where it is not known."""

    @property
    def largest(self) -> Stage:
        """The stage with the highest peak."""
        return max((*self.build, *self.validation), key=lambda stage: stage.peak_rss_bytes)

    @property
    def duration(self) -> str:
        """The time of the build and of its validation, in words."""
        return f"{in_words(self.build_seconds)} and its validation {in_words(self.validation_seconds)}"

    @property
    def build_peak_rss_bytes(self) -> int:
        """The peak without validation: `build.peak_rss_bytes` in the report."""
        return max(stage.peak_rss_bytes for stage in self.build)

    @property
    def process_peak_rss_bytes(self) -> int:
        """The peak of the process that builds and validates, without the measuring processes."""
        return max(
            stage.peak_rss_bytes - stage.parts.get(BESIDE, 0) - stage.parts.get(JOBS, 0)
            for stage in (*self.build, *self.validation)
        )

    def to_plain(self) -> dict[str, Any]:
        """The output of `cpcompile estimate --json`; keys are stable, names of stages and parts are only for display.

        peak_rss_bytes, build_peak_rss_bytes, process_peak_rss_bytes
        build[], validation[]     name, peak_rss_bytes, parts{name: bytes}
        engines{context}, eager   load_peak_rss_bytes, run_peak_rss_bytes; eager is null where nothing is compared
        bundle_bytes, duration, build_seconds, validation_seconds, not_counted[]
        """
        return {
            "peak_rss_bytes": self.largest.peak_rss_bytes,
            "build_peak_rss_bytes": self.build_peak_rss_bytes,
            "process_peak_rss_bytes": self.process_peak_rss_bytes,
            "build": [_plain(stage) for stage in self.build],
            "validation": [_plain(stage) for stage in self.validation],
            "engines": {name: dataclasses.asdict(process) for name, process in self.engines.items()},
            "eager": dataclasses.asdict(self.eager) if self.eager else None,
            "bundle_bytes": self.bundle_bytes,
            "duration": self.duration,
            "build_seconds": self.build_seconds,
            "validation_seconds": self.validation_seconds,
            "not_counted": list(NOT_COUNTED),
        }


def estimate(
    facts: Facts, libraries: Libraries, config: BuildConfig, validation: ValidateConfig, shape: RunShape = ONE_SEQUENCE
) -> Estimate:
    """The peaks of a build of the model with `facts`, of its validation, and of runs of its engines."""
    largest = max(facts.contexts.values(), key=lambda context: context.engine_bytes)
    engine = max(largest.engine_bytes, facts.union_bytes + largest.head_bytes if config.merged else 0)
    dense = facts.dense_bytes or 0
    trace = TRACE * facts.tensors if facts.model_type is not None else 0
    lasting = {
        "weights": facts.bytes,
        "graphs": trace + GRAPH * facts.tensors,
        "ordered vocabulary": facts.vocabulary_bytes if config.vocabulary_coverage is not None else 0,
    }
    written = 2 * largest.kept_bytes if config.standalone else 0  # the message and its bytes
    building = {"libraries": libraries.build}
    build = (
        _stage("load", building | {"weights": facts.bytes, "graphs": trace}),
        _stage("capture, freeze, export", building | lasting | {"one engine in full": written}),
    )

    in_parity = _results(facts, max(batch * sequence for batch, sequence in validation.shapes))
    generated = PROMPTS * (PROMPT_TOKENS + NEW_TOKENS) if validation.coherence else 0
    in_quality = _results(facts, max(BATCH * facts.sequence, generated))
    window = 24 * facts.sequence * facts.classes
    here = {"libraries": libraries.validation} | lasting
    in_float64 = {"float64": 2 * facts.bytes, "results": _held(4 * in_parity)}
    compared = (
        _stage("validate: parity", here | {"engine": engine} | in_float64),
        _stage("validate: quality", here | {"engine": engine, "dense": dense, "results": _held(in_quality) + window}),
    )
    jobs = min(validation.jobs, len(facts.contexts))
    each = max(stage.peak_rss_bytes for stage in compared) - GRAPH * facts.tensors - lasting["ordered vocabulary"]
    validating = list(compared) if jobs == 1 else [_stage("validate: contexts", here | {JOBS: jobs * each})]
    if validation.speed and DENSE_PEER in validation.peers and dense:
        timed = _held(_results(facts, max(batch * sequence for batch, sequence in validation.speed_shapes)))
        dense_engine = {"dense in ONNX Runtime": dense + largest.head_bytes}
        validating.append(
            _stage("validate: speed", here | {"engine": engine, "dense": dense} | dense_engine | {"results": timed})
        )
    engines = {
        name: _process(libraries.engine + context.engine_bytes, _results(facts, shape.positions, context.classes))
        for name, context in facts.contexts.items()
    }
    eager = None
    if facts.result_elements is not None:  # a program is its own baseline, and loading it imports what a trace needs
        eager = _process(libraries.build + facts.bytes, _results(facts, shape.positions))
    elif facts.dense_bytes is not None:
        eager = _process(libraries.eager + dense, _results(facts, shape.positions))
    if validation.memory:
        beside = max(process.run_peak_rss_bytes for process in (*engines.values(), *([eager] if eager else [])))
        validating.append(_stage("validate: memory", here | {"dense": dense, BESIDE: beside}))
    pace = libraries.pace
    return Estimate(
        build=build,
        validation=tuple(validating),
        engines=engines,
        eager=eager,
        bundle_bytes=_bundle_bytes(facts, config),
        build_seconds=None if pace is None else build_seconds(facts, pace),
        validation_seconds=None if pace is None else validation_seconds(facts, pace, config, validation),
    )


def _plain(stage: Stage) -> dict[str, Any]:
    return {"name": stage.name, "peak_rss_bytes": stage.peak_rss_bytes, "parts": dict(stage.parts)}


def _stage(name: str, parts: Mapping[str, int]) -> Stage:
    return Stage(name, {what: size for what, size in parts.items() if size})


def _process(loaded: int, results: int) -> Process:
    return Process(load_peak_rss_bytes=loaded, run_peak_rss_bytes=loaded + _held(results))


def _results(facts: Facts, positions: int, classes: int | None = None) -> int:
    """Bytes of a result in float32: the logits, of `classes` or of all; or the largest of a program."""
    if facts.result_elements is not None:
        return 4 * facts.result_elements
    return 4 * positions * (facts.classes if classes is None else classes)


def _held(results: int) -> int:
    """W: what a run holds in order to give results of so many bytes."""
    return results + min(4 * results, HEAP)


def _bundle_bytes(facts: Facts, config: BuildConfig) -> int:
    """Weights, graphs and tokenizers on disk."""
    each = facts.contexts.values()
    weights = sum(context.kept_bytes for context in each) if config.standalone else facts.union_bytes
    tokenizers = facts.tokenizer_bytes
    if config.vocabulary_coverage is not None:
        tokenizers = sum(facts.tokenizer_bytes * context.classes // facts.classes for context in each)
    return weights + ENGINE_GRAPH * facts.tensors * (len(facts.contexts) + config.merged) + tokenizers

"""Peak resident memory of a build, stage by stage, from facts about a model and what the libraries take.

With M bytes of weights in T tensors, D of the dense baseline, K of the largest engine (its head twice if it is the
embedding too), n positions of a run and V logits per position:

    load       L + M + P T                          weights are in memory once; P: a pretrained model is traced
    build      L + M + (P + G) T + R                graphs share the weights; R: the vocabulary in a new order
    parity     L'+ M + (P + G) T + R + K + 2M + W(16 n V)     float64; logits in float32, float64 and of the engine
    quality    L'+ M + (P + G) T + R + K + D + W(4 n' V) + 24 s V   windows of s tokens in float64, three arrays
    measuring  L'+ M + (P + G) T + R + D  here, and beside it the larger of
               engine  E + K + W(4 n V)             eager  A + D + W(4 n V)

L, L', E, A are measured anew each time (`libraries`). W(x) = x + min(4 x, HEAP) is what results of x bytes take with
the activations that they are made of: glibc serves arrays below 32 MB from the heap, where holes remain, and maps
larger ones, which go back at once (mallopt(3), M_MMAP_THRESHOLD). G, P and HEAP were measured, by
`benchmarks/memory_estimate.py`, on models of 24 to 332 tensors and 0.2 to 135 million parameters: they are what is to
be put right if its table shows more than 20 %.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cpcompile.config import ValidateConfig
from cpcompile.estimation.facts import ContextFacts, Facts
from cpcompile.estimation.libraries import Libraries
from cpcompile.validation.coherence import NEW_TOKENS, PROMPT_TOKENS, PROMPTS
from cpcompile.validation.quality import BATCH

GRAPH = 450_000
"""G: bytes of graphs per tensor, with all contexts frozen."""
TRACE = 250_000
"""P: bytes per tensor of the trace in which groups of a pretrained model are found."""
HEAP = 64_000_000
"""Bytes that activations leave in the heap."""
BESIDE = "process beside it"
ENGINE_GRAPH = 1_200
"""Bytes of an engine's file per tensor."""
DURATIONS = ((30_000_000, "about a minute"), (300_000_000, "minutes"))
"""Up to so many parameters, on two cores, with validation."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked for: settings of a build, and the shape of the engines' runs."""

    standalone: bool = False
    merged: bool = False
    trimmed: bool = False
    memory: bool = True
    """Memory is measured, in processes of their own."""
    batch: int = 1
    sequence: int = 128


@dataclass(frozen=True)
class Stage:
    """Resident bytes at the peak of a stage, by what they are for."""

    name: str
    parts: Mapping[str, int]
    """Those that are not 0, the lasting ones first."""

    @property
    def peak_rss_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Process:
    """Peak resident bytes of a process of its own, with the batch and sequence that were asked for."""

    load_peak_rss_bytes: int
    run_peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a build is going to take."""

    build: tuple[Stage, ...]
    """What the report calls the build."""
    validation: tuple[Stage, ...]
    engines: Mapping[str, Process]
    eager: Process | None
    """Of the dense baseline, or of a program; None if there is none."""
    bundle_bytes: int
    duration: str
    not_counted: tuple[str, ...] = field(default=("peers of --peers", "--data: text that is read anew"))

    @property
    def largest(self) -> Stage:
        """The stage with the highest peak."""
        return max((*self.build, *self.validation), key=lambda stage: stage.peak_rss_bytes)

    def to_plain(self) -> dict[str, Any]:
        """Plain containers, with the totals."""
        stages = {"build": self.build, "validation": self.validation}
        peaks = {name: [_plain(stage) for stage in those] for name, those in stages.items()}
        return (
            {
                "peak_rss_bytes": self.largest.peak_rss_bytes,
                "build_peak_rss_bytes": self.build_peak_rss_bytes,
                "process_peak_rss_bytes": self.process_peak_rss_bytes,
            }
            | dataclasses.asdict(self)
            | peaks
        )

    @property
    def build_peak_rss_bytes(self) -> int:
        return max(stage.peak_rss_bytes for stage in self.build)

    @property
    def process_peak_rss_bytes(self) -> int:
        """Of the process that builds and validates, without those that measure beside it."""
        return max(stage.peak_rss_bytes - stage.parts.get(BESIDE, 0) for stage in (*self.build, *self.validation))


def estimate(facts: Facts, libraries: Libraries, plan: Plan, config: ValidateConfig | None = None) -> Estimate:
    """The peaks of a build of the model with `facts` as `plan` says, validated as `config` says."""
    config = config or ValidateConfig()
    weights = facts.bytes
    trace = TRACE * facts.tensors if facts.library is not None else 0
    rows = facts.vocabulary_bytes if plan.trimmed else 0
    here = {"weights": weights, "graphs": trace + GRAPH * facts.tensors, "ordered vocabulary": rows}
    largest = max(facts.contexts.values(), key=_engine_bytes)
    engine = max(_engine_bytes(largest), facts.union_bytes + largest.head_bytes if plan.merged else 0)
    dense = facts.dense_bytes or 0

    written = 2 * largest.kept_bytes if plan.standalone else 0  # the message and its bytes
    build = (
        _stage("load", {"libraries": libraries.build, "weights": weights, "graphs": trace}),
        _stage("capture, freeze, export", {"libraries": libraries.build} | here | {"one engine in full": written}),
    )
    in_parity = _results(facts, max(batch * sequence for batch, sequence in config.shapes))
    generated = PROMPTS * (PROMPT_TOKENS + NEW_TOKENS) if config.coherence else 0
    in_quality = _results(facts, max(BATCH * facts.sequence, generated))
    window = 0 if facts.result_elements is not None else 24 * facts.sequence * facts.classes
    here = {"libraries": libraries.validation} | here
    validation = [
        _stage("validate: parity", here | {"engine": engine, "float64": 2 * weights, "results": _held(4 * in_parity)}),
        _stage("validate: quality", here | {"engine": engine, "dense": dense, "results": _held(in_quality) + window}),
    ]
    in_run = plan.batch * plan.sequence
    engines = {
        name: Process(
            load_peak_rss_bytes=libraries.engine + _engine_bytes(context),
            run_peak_rss_bytes=libraries.engine + _engine_bytes(context) + _held(_results(facts, in_run, context)),
        )
        for name, context in facts.contexts.items()
    }
    eager = None
    if facts.result_elements is not None:  # a program is its own peer, and loading it imports what a trace needs
        loaded = libraries.build + weights
        eager = Process(load_peak_rss_bytes=loaded, run_peak_rss_bytes=loaded + _held(_results(facts, in_run)))
    elif facts.dense_bytes is not None:
        loaded = libraries.eager + dense
        eager = Process(load_peak_rss_bytes=loaded, run_peak_rss_bytes=loaded + _held(_results(facts, in_run)))
    if plan.memory:
        beside = max(process.run_peak_rss_bytes for process in (*engines.values(), *([eager] if eager else [])))
        validation.append(_stage("validate: memory", here | {"dense": dense, BESIDE: beside}))
    return Estimate(
        build=build,
        validation=tuple(validation),
        engines=engines,
        eager=eager,
        bundle_bytes=_bundle_bytes(facts, plan),
        duration=next((words for limit, words in DURATIONS if facts.parameters <= limit), "longer than was tried"),
    )


def _plain(stage: Stage) -> dict[str, Any]:
    return {"name": stage.name, "peak_rss_bytes": stage.peak_rss_bytes, "parts": dict(stage.parts)}


def _stage(name: str, parts: Mapping[str, int]) -> Stage:
    return Stage(name, {what: size for what, size in parts.items() if size})


def _engine_bytes(context: ContextFacts) -> int:
    return context.kept_bytes + context.head_bytes


def _results(facts: Facts, positions: int, context: ContextFacts | None = None) -> int:
    """Bytes of a result in float32: the logits, or the largest of a program."""
    if facts.result_elements is not None:
        return 4 * facts.result_elements
    return 4 * positions * (context.classes if context else facts.classes)


def _held(results: int) -> int:
    """W: what a run holds in order to give results of so many bytes."""
    return results + min(4 * results, HEAP)


def _bundle_bytes(facts: Facts, plan: Plan) -> int:
    """Weights, graphs and tokenizers on disk."""
    each = facts.contexts.values()
    weights = sum(context.kept_bytes for context in each) if plan.standalone else facts.union_bytes
    tokenizers = facts.tokenizer_bytes
    if plan.trimmed and facts.classes:
        tokenizers = sum(facts.tokenizer_bytes * context.classes // facts.classes for context in each)
    return weights + ENGINE_GRAPH * facts.tensors * (len(facts.contexts) + plan.merged) + tokenizers

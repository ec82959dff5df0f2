"""What report.json holds; `report.schema.json` beside this file is its contract, `core.json_form` writes and reads it.

A value that was not measured is null in the file, and `not_measured` of the same object says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cpcompile.core.cache import CacheBytes
from cpcompile.core.measured import Measurements, NotMeasured
from cpcompile.machine.environment import Environment
from cpcompile.report.results import VariantResult, Verdict
from cpcompile.report.training_summary import TrainingSummary

SCHEMA_VERSION = 2
SCHEMA = Path(__file__).with_name("report.schema.json")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What was compiled."""

    name: str
    architecture: str
    config: Mapping[str, int | float | str | bool]


@dataclass(frozen=True, kw_only=True)
class BuildStage:
    """One stage of a build; resident peaks count from the start of the build, private peaks from that of the stage."""

    name: str
    seconds: float
    peak_rss_bytes: int | None = None
    peak_private_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A set of engines that `--target best` tried, one for every context."""

    name: str
    precision: str
    """That of the variant: engines that round their parameters in different ways are all called mixed."""
    rounded: Mapping[str, tuple[str, ...]]
    """By precision the parameters that are rounded in it; the others are in float32."""
    bits_per_weight: float
    """The mean over all parameters, with their scales."""
    bytes: int
    """The largest engine with its share of the weights."""
    increase: float
    """Of the mean perplexity over that of the dense baseline, on the half of the held-out text that was searched."""
    increase_error: float
    """The standard error of its logarithm."""
    within_budget: bool
    p50_ms: Mapping[str, float]
    """By batch x sequence, of one context."""
    relative_time: float
    """Geometric mean over these shapes of the latency as a part of that in float32."""


@dataclass(frozen=True, kw_only=True)
class PrecisionSearch:
    """How `--target best` chose."""

    budget: float
    context: str
    """The context whose engines were timed."""
    tokens: int
    """Held-out tokens on which the candidates were compared."""
    candidates: tuple[Candidate, ...]
    chosen: str
    reason: str
    other_increase: float
    """The increase of the chosen engines on the other part of the held-out text."""
    other_increase_error: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BuildResult(Measurements):
    """Time and memory of a build."""

    seconds: float | NotMeasured
    peak_rss_bytes: int | NotMeasured
    peak_private_bytes: int | NotMeasured
    stages: tuple[BuildStage, ...] = ()
    search: PrecisionSearch | None = None
    """None unless the build searched for the best precision."""


@dataclass(frozen=True, kw_only=True)
class BundleSizes(Measurements):
    """Size of the bundle, and of the weights of the dense model in the bundle's precision."""

    bytes: int
    dense_bytes: int | NotMeasured
    shared_weights: bool


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """The elements of all parameters of one context: total = kept + removed."""

    total: int
    kept: int
    removed: int
    removed_by_kind: Mapping[str, int]
    removed_experts: Mapping[str, tuple[int, ...]]
    """For every mixture of experts, by its router, the experts that this context does not have."""


@dataclass(frozen=True, kw_only=True)
class ContextResult:
    """One context: its parameters, and the engines that were measured."""

    name: str
    parameters: ParameterCounts
    variants: tuple[VariantResult, ...]
    cache: CacheBytes | None = None
    """None if its engines have no cache."""


@dataclass(frozen=True, kw_only=True)
class LayerSelection:
    """The units of one layer that each context keeps, a digit per unit: 1 where the context keeps it."""

    name: str
    kept: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class SelectionSummary(Measurements):
    """Which units the contexts keep, by kind and layer."""

    kinds: Mapping[str, tuple[LayerSelection, ...]] | NotMeasured


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything about a bundle, with the verdict on it."""

    schema_version: int = SCHEMA_VERSION
    verdict: Verdict
    reasons: tuple[str, ...]
    """Why the verdict is not a pass."""
    model: ModelInfo
    environment: Environment
    build: BuildResult
    bundle: BundleSizes
    contexts: tuple[ContextResult, ...]
    selection: SelectionSummary
    training: TrainingSummary | None
    """None if the checkpoint records no training results."""
    conditions: Mapping[str, str] = field(default_factory=dict)
    """Digests of what the results depend on besides the engines, by name."""

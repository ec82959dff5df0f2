"""Measurements of one engine. The validator fills them in, the verdict is based on them, report.json contains them.

    VariantResult  one engine
        Parity       it computes what the masked eager model of its context computes
        Quality      it predicts held-out text as well as the dense baseline
        Memory       peaks of engine and dense baseline, each in a process of its own; Start: until the first answer
        Speed        latency, engine and eager model timed side by side; Throughput: several requests at a time
        Placement    which provider ran which node
        PeerResult   what else was run for comparison
        Diagnosis    where it diverges from the model

A field that was not measured holds the reason (`cpcompile.core.measured`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from cpcompile.core.measured import Measurements, NotMeasured

Verdict: TypeAlias = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Parity(Measurements):
    """The compiler's correctness for one engine; true if it passes."""

    verdict: Verdict
    reason: str | None = None
    """Why it is not a pass."""
    tolerance: float | NotMeasured
    tolerance_source: str | NotMeasured
    max_abs_error: float | NotMeasured
    """Engine against the masked eager model in float32."""
    max_abs_error_float64: float | NotMeasured
    """Engine against the masked eager model in float64: what `tolerance` is compared with."""
    eager_float32_error: float | NotMeasured
    """The eager model in float32 against itself in float64."""
    max_relative_error: float | NotMeasured
    """`max_abs_error_float64` as a part of the largest value."""
    cosine: float | NotMeasured
    """Cosine of engine and float64."""
    sqnr_db: float | NotMeasured
    """Signal to quantization noise: mean square of float64 to mean square error of the engine."""
    psnr_db: float | NotMeasured
    """The same with the square of the largest value in place of the mean square."""
    mean_kl: float | NotMeasured
    """Mean over the positions of KL(eager || engine) in nats."""
    top1_agreement: float | NotMeasured
    """Fraction of positions where engine and eager model name the same token."""
    top5_agreement: float | NotMeasured
    """Fraction of positions where the eager model's token is among the engine's five likeliest."""
    tokens: int | NotMeasured
    """Positions compared."""

    def __bool__(self) -> bool:
        return self.verdict == "pass"


@dataclass(frozen=True, kw_only=True)
class Quality(Measurements):
    """Engine and dense baseline on the same held-out tokens."""

    perplexity: float | NotMeasured
    dense_perplexity: float | NotMeasured
    accuracy: float | NotMeasured
    dense_accuracy: float | NotMeasured
    tokens: int | NotMeasured
    coherence: float | NotMeasured
    coherence_error: float | NotMeasured
    """Standard error of the mean over the prompts."""
    dense_coherence: float | NotMeasured
    dense_coherence_error: float | NotMeasured
    coherence_difference_error: float | NotMeasured
    """Standard error of the difference between both."""


@dataclass(frozen=True, kw_only=True)
class Memory(Measurements):
    """Peak resident bytes from the kernel, and peak private bytes from samples, as `cpcompile.machine.memory` says.

    `base` is the process with its libraries before anything is loaded.
    """

    load_peak_rss_bytes: int | NotMeasured
    run_peak_rss_bytes: int | NotMeasured
    base_rss_bytes: int | NotMeasured
    load_peak_private_bytes: int | NotMeasured
    run_peak_private_bytes: int | NotMeasured
    base_private_bytes: int | NotMeasured
    eager_load_peak_rss_bytes: int | NotMeasured
    eager_run_peak_rss_bytes: int | NotMeasured
    eager_base_rss_bytes: int | NotMeasured
    eager_load_peak_private_bytes: int | NotMeasured
    eager_run_peak_private_bytes: int | NotMeasured
    eager_base_private_bytes: int | NotMeasured
    vram_bytes: int | NotMeasured
    """Memory of the engine on the GPU."""


@dataclass(frozen=True, kw_only=True)
class Start(Measurements):
    """From nothing to the first answer, in milliseconds: loading, and the first run. One sample each."""

    load_ms: float | NotMeasured
    first_run_ms: float | NotMeasured
    eager_load_ms: float | NotMeasured
    eager_first_run_ms: float | NotMeasured


@dataclass(frozen=True, kw_only=True)
class PeerSpeed:
    """Latency of an alternative to the engine; ratio = its p50 / engine p50."""

    p50_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True, kw_only=True)
class ShapeSpeed(Measurements):
    """Latency of one run at (batch, sequence); ratio = eager p50 / engine p50, with its 95 % interval."""

    batch: int
    sequence: int | NotMeasured
    p50_ms: float
    p90_ms: float
    p99_ms: float
    quantiles_ms: tuple[float, ...]
    """The distribution: 21 quantiles, from the smallest to the largest in steps of 5 %."""
    eager_p50_ms: float | NotMeasured
    eager_p90_ms: float | NotMeasured
    eager_p99_ms: float | NotMeasured
    eager_quantiles_ms: tuple[float, ...] | NotMeasured
    ratio: float | NotMeasured
    ratio_low: float | NotMeasured
    ratio_high: float | NotMeasured
    peers: Mapping[str, PeerSpeed] = field(default_factory=dict)
    """Timed in the same rounds, by name."""
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Speed(Measurements):
    """Latency at several shapes, both sides with the same number of threads."""

    verdict: Verdict | NotMeasured
    """Whether every shape reaches the required ratio."""
    reason: str | None = None
    """Why it is not a pass."""
    shapes: tuple[ShapeSpeed, ...] | NotMeasured
    threads: int | NotMeasured


@dataclass(frozen=True, kw_only=True)
class Throughput(Measurements):
    """Requests of (batch, sequence) per second; ratio = engine / eager, with its 95 % interval."""

    workers: int | NotMeasured
    """Concurrent requests, each on one thread."""
    requests_per_second: float | NotMeasured
    """Median over the rounds."""
    eager_requests_per_second: float | NotMeasured
    ratio: float | NotMeasured
    ratio_low: float | NotMeasured
    ratio_high: float | NotMeasured


@dataclass(frozen=True, kw_only=True)
class PlacedNode:
    """One node that ran. `precision`: element type of its first output as ONNX Runtime names it, None for no tensor."""

    name: str
    operator: str
    provider: str
    precision: str | None


@dataclass(frozen=True, kw_only=True)
class Placement(Measurements):
    """Every node that ran, and how many per provider, operator and precision."""

    verdict: Literal["pass", "fail"] | NotMeasured
    """Whether all nodes ran on the provider that the engine was made for."""
    reason: str | None = None
    """The node that did not."""
    nodes: tuple[PlacedNode, ...] | NotMeasured
    providers: Mapping[str, int] | NotMeasured
    operators: Mapping[str, int] | NotMeasured
    precisions: Mapping[str, int] | NotMeasured


@dataclass(frozen=True)
class LayerError:
    """The last value that leaves a module: accumulated error of the engine, and largest value of the reference."""

    module: str
    """Empty: the whole model."""
    value: str
    max_abs_error: float | None
    """None if it is not finite or has another shape."""
    largest: float


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Measurements):
    """The first divergence of an engine from its model, and the errors of its layers."""

    sentence: str | NotMeasured
    node: str | NotMeasured
    operator: str | NotMeasured
    module: str | NotMeasured
    value: str | NotMeasured
    difference: str | NotMeasured
    max_abs_error: float | NotMeasured
    tolerance: float | NotMeasured
    candidates: Sequence[str] = ()
    repro: str | NotMeasured
    """Folder of the minimal repro."""
    layers: tuple[LayerError, ...] | NotMeasured
    """The error of the whole engine, module by module."""


@dataclass(frozen=True, kw_only=True)
class PeerResult:
    """An alternative to the engine; its latency is reported with the engine's."""

    name: str
    computes: Literal["context", "dense"]
    status: Literal["ran", "skipped"]
    reason: str | None = None
    """Why it did not run."""
    parity: Parity | None = None
    """Against the masked eager model, where it computes the context."""


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """All results of one engine. `status`: it was only built, it ran here, or it was skipped."""

    name: str
    runtime: str
    precision: str
    bytes: int | None
    status: Literal["built", "ran", "skipped"]
    reason: str | None
    """Why it did not run."""
    parity: Parity
    quality: Quality
    memory: Memory
    start: Start
    speed: Speed
    throughput: Throughput
    placement: Placement
    peers: tuple[PeerResult, ...] = ()
    divergence: Diagnosis | None = None
    """The first node that differs where parity failed, and the errors of layers; None if neither was requested."""
    kept: bool = False
    """Whether these are the results of the build before, of an engine with the same content."""

    @classmethod
    def not_run(
        cls,
        *,
        name: str,
        runtime: str,
        precision: str,
        status: Literal["built", "skipped"],
        reason: str,
        bytes: int | None = None,
    ) -> VariantResult:
        """An engine that could not be built, or not be run here: no numbers, one reason."""
        return cls(
            name=name,
            runtime=runtime,
            precision=precision,
            bytes=bytes,
            status=status,
            reason=reason,
            parity=Parity.without(reason, verdict="inconclusive", reason=reason),
            quality=Quality.without(reason),
            memory=Memory.without(reason),
            start=Start.without(reason),
            speed=Speed.without(reason),
            throughput=Throughput.without(reason),
            placement=Placement.without(reason),
        )


Results: TypeAlias = Mapping[str, tuple[VariantResult, ...]]
"""The engines of every context."""
NO_RESULTS: Results = {}


def ratio_with_bounds(timed: ShapeSpeed | Throughput) -> tuple[float, float, float] | NotMeasured:
    """The ratio of engine and eager model, and the bounds of its interval."""
    ratio, low, high = timed.ratio, timed.ratio_low, timed.ratio_high
    if isinstance(ratio, NotMeasured):
        return ratio
    if isinstance(low, NotMeasured):
        return low
    return high if isinstance(high, NotMeasured) else (ratio, low, high)

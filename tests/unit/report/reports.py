"""Reports as the validator would write them, about which everything is known."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cpcompile.core.cache import CacheBytes
from cpcompile.core.json_form import from_json, to_json
from cpcompile.core.measured import NotMeasured
from cpcompile.machine.environment import environment
from cpcompile.machine.memory import ProcessMemory
from cpcompile.report import (
    BuildResult,
    BuildStage,
    ContextResult,
    ModelInfo,
    ParameterCounts,
    Report,
    make_report,
    summarize_training,
)
from cpcompile.report.contents import Candidate, PrecisionSearch
from cpcompile.report.results import (
    Parity,
    PeerResult,
    PeerSpeed,
    PlacedNode,
    Placement,
    ShapeSpeed,
    Speed,
    Throughput,
    VariantResult,
)
from cpcompile.validation.memory import compare_memory, compare_start
from cpcompile.validation.quality import Score, compare_quality

ENVIRONMENT = environment()
TRAINING = {
    "perplexity": {"dense-baseline": {"de": 20.0, "en": 30.0}, "partition": {"de": 19.0, "en": 29.0}},
    "controls": {
        "small-dense": {"description": "a dense model of the active size", "perplexity": {"de": 18.0, "en": 28.0}},
        "one-mask": {"description": "one selection for all", "perplexity": {"de": 19.01, "en": 29.01}},
    },
    "swap_matrix": {"contexts": ["de", "en"], "perplexity": [[19.0, 40.0], [35.0, 29.0]]},
}


SELECTION = {
    "ffn": [
        {"name": "layer 0", "kept": {"de": "1100", "en": "1010"}},
        {"name": "layer 1", "kept": {"de": "1111", "en": "1000"}},
    ],
    "head": [{"name": "layer 0", "kept": {"de": "10", "en": "01"}}],
}


COHERENCE = np.array([0.2, 0.4, 0.5, 0.7])
"""Of four prompts."""

SEARCH = PrecisionSearch(
    budget=0.01,
    context="de",
    tokens=4096,
    candidates=tuple(
        Candidate(
            name=name,
            precision=name,
            rounded={} if name == "fp32" else {name: ("layers.0.ffn.up.weight",)},
            bits_per_weight=bits,
            bytes=round(bits * 1e6),
            increase=increase,
            increase_error=0.001,
            within_budget=increase < 0.01,
            p50_ms={"1x128": time, "1x1": time / 8},
            relative_time=time / 4,
        )
        for name, bits, increase, time in (
            ("fp32", 32.0, 0.0, 4.0),
            ("int8", 8.1, 0.002, 2.0),
            ("int4-weights", 5.2, 0.2, 1.5),
        )
    ),
    chosen="int8",
    reason="the fastest within the budget",
    other_increase=0.003,
    other_increase_error=0.001,
    seconds=20.0,
)


def quantiles(median: float) -> tuple[float, ...]:
    """Quantiles from 0.9 to 1.3 times `median`."""
    return tuple(median * (0.9 + 0.1 * min(i, 10) / 10 + 0.3 * max(i - 10, 0) / 10) for i in range(21))


PROCESSES = tuple(
    ProcessMemory(
        base_rss_bytes=b,
        load_peak_rss_bytes=2 * b,
        run_peak_rss_bytes=3 * b,
        vram_bytes=NotMeasured("no NVIDIA GPU"),
        base_private_bytes=b // 2,
        load_peak_private_bytes=b,
        run_peak_private_bytes=2 * b,
        load_ms=b / 1e6,
        first_run_ms=b / 1e7,
    )
    for b in (50_000_000, 200_000_000)
)


@dataclass(frozen=True, kw_only=True)
class Engine(VariantResult):
    """An engine, with the context that it belongs to."""

    context: str = "de"

    @property
    def result(self) -> VariantResult:
        return VariantResult(**{each.name: getattr(self, each.name) for each in dataclasses.fields(VariantResult)})


def variant(context: str = "de", *, perplexity: float = 19.0, dense: float | str = 20.0) -> Engine:
    """An engine about which everything is known."""
    return Engine(
        context=context,
        name="cpu-fp32",
        runtime="onnxruntime",
        precision="fp32",
        bytes=1_000_000,
        status="ran",
        reason=None,
        parity=Parity.without(
            "the model gives no logits",
            verdict="pass",
            tolerance=1.6e-5,
            tolerance_source="8 x the eager model's own float32 error 2e-06",
            max_abs_error=3e-6,
            max_abs_error_float64=2e-6,
            eager_float32_error=2e-6,
            mean_kl=-1e-17,
            top1_agreement=1.0,
            tokens=100,
        ),
        quality=compare_quality(
            Score(perplexity=perplexity, accuracy=0.3, tokens=100, coherence=COHERENCE),
            Score(perplexity=dense, accuracy=0.25, tokens=100, coherence=COHERENCE[::-1])
            if isinstance(dense, float)
            else NotMeasured(dense),
        ),
        memory=compare_memory(*PROCESSES),
        start=compare_start(*PROCESSES),
        speed=Speed(
            shapes=(
                ShapeSpeed(
                    batch=1,
                    sequence=128,
                    p50_ms=1.0,
                    p90_ms=1.1,
                    p99_ms=1.2,
                    quantiles_ms=quantiles(1.0),
                    eager_p50_ms=3.0,
                    eager_p90_ms=3.1,
                    eager_p99_ms=3.2,
                    eager_quantiles_ms=quantiles(3.0),
                    ratio=3.0,
                    ratio_low=2.9,
                    ratio_high=3.1,
                    peers={"onnx-dense": PeerSpeed(p50_ms=2.0, ratio=2.0, ratio_low=1.9, ratio_high=2.1)},
                    rounds=60,
                ),
                ShapeSpeed.without(
                    "there is no dense baseline",
                    batch=1,
                    sequence=1,
                    p50_ms=0.25,
                    p90_ms=0.3,
                    p99_ms=0.4,
                    quantiles_ms=quantiles(0.25),
                    rounds=60,
                ),
            ),
            threads=2,
            verdict=NotMeasured("no least ratio was demanded"),
        ),
        throughput=Throughput(
            workers=2,
            requests_per_second=800.0,
            eager_requests_per_second=200.0,
            ratio=4.0,
            ratio_low=3.8,
            ratio_high=4.1,
        ),
        placement=Placement(
            verdict="pass",
            nodes=(PlacedNode(name="MatMul_0", operator="MatMul", provider="CPUExecutionProvider", precision="float"),),
            providers={"CPUExecutionProvider": 1},
            operators={"MatMul": 1},
            precisions={"float": 1},
        ),
        peers=(
            PeerResult(name="onnx-dense", computes="dense", status="ran"),
            PeerResult(name="openvino", computes="context", status="skipped", reason="openvino is not installed"),
        ),
    )


def skipped() -> Engine:
    return Engine.not_run(
        name="tensorrt-fp16",
        runtime="tensorrt",
        precision="fp16",
        status="skipped",
        reason="tensorrt [the library] is not installed",
    )


def report(*variants: Engine, bundle_bytes: int = 9, dense_bytes: int | None = 10) -> dict[str, Any]:
    """The JSON of a report, which `as_report` makes one again."""
    made = make_report(**arguments(*variants, bundle_bytes=bundle_bytes, dense_bytes=dense_bytes))
    content: dict[str, Any] = json.loads(json.dumps(to_json(made)))
    return content


def as_report(content: dict[str, Any]) -> Report:
    """The report that `content` is the JSON of."""
    return from_json(Report, content)


def arguments(*variants: Engine, bundle_bytes: int = 9, dense_bytes: int | None = 10) -> dict[str, Any]:
    """Those of `make_report`."""
    parameters = ParameterCounts(
        total=4_000_000,
        kept=1_000_000,
        removed=3_000_000,
        removed_by_kind={"ffn": 3_000_000},
        removed_experts={},
    )
    contexts = dict.fromkeys(v.context for v in variants)
    return {
        "model": ModelInfo(name="model", architecture="decoder", config={"width": 64, "tied": True}),
        "environment": ENVIRONMENT,
        "build": BuildResult(
            seconds=12.5,
            peak_rss_bytes=300_000_000,
            peak_private_bytes=200_000_000,
            stages=(BuildStage(name="capture", seconds=3.0),),
            search=SEARCH,
        ),
        "bundle_bytes": bundle_bytes,
        "dense_bytes": dense_bytes,
        "shared_weights": True,
        "contexts": [
            ContextResult(
                name=c,
                parameters=parameters,
                variants=tuple(v.result for v in variants if v.context == c),
                cache=CacheBytes(bytes_per_token=3_072, dense_bytes_per_token=12_288),
            )
            for c in contexts
        ],
        "selection": SELECTION,
        "training": summarize_training(TRAINING, ("de", "en")),
        "max_perplexity_increase": 0.01,
    }


def complete() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_complete())
    return content


@cache
def _complete() -> str:
    return json.dumps(report(variant(), skipped(), variant("en", perplexity=29.0, dense=30.0)))

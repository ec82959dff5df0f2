"""The verdict on the measurements.

    fail          an engine misses parity, is slower than required, or has nodes that fell back to
                  another provider; or the mean perplexity over the contexts exceeds the dense
                  baseline's by more than the limit; or a bundle with shared weights is larger than the dense
                  model, not counting graphs, tokenizers and TensorRT plans
    inconclusive  one of these could not be measured; an engine that was built and not run here is not judged,
                  and a context of which no engine ran is inconclusive
    pass          otherwise

Mean perplexities are geometric: exp of the mean loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from cpcompile.core.config import MIXED, ROUNDED
from cpcompile.core.measured import NotMeasured
from cpcompile.report.contents import BundleSizes, ContextResult
from cpcompile.report.results import Diagnosis, Verdict
from cpcompile.report.training_summary import mean_perplexity
from cpcompile.targets.requests import FLAVOURS, OPENVINO

GRAPH_BYTES = 200_000
"""What an engine may add to the weights: its graph, its part of manifest and tokenizer."""

Pair: TypeAlias = tuple[float | NotMeasured, float | NotMeasured]


def judge(
    contexts: Sequence[ContextResult],
    bundle: BundleSizes,
    max_perplexity_increase: float | None,
    *,
    stored_once: int = 0,
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict, and the reasons why it is not a pass.

    max_perplexity_increase: by what part the mean perplexity may exceed the dense baseline's; None where quality is not
    measured as perplexity. stored_once: by how many bytes the sizes of engines in other precisions exceed their files,
    because they share them.
    """
    failures: list[str] = []
    gaps: list[str] = []
    reasons = {variant.reason for context in contexts for variant in context.variants}
    if len(reasons) == 1 and None not in reasons:  # of a build without validation, say
        return "inconclusive", (f"no engine ran: {reasons.pop()}",)
    for context in contexts:
        ran = [variant for variant in context.variants if variant.status == "ran"]
        if not ran:
            gaps.append(f"{context.name}: no engine of this context ran")
        for variant in ran:
            parity = variant.parity
            if parity.verdict != "pass":
                sentence = f"{context.name} {variant.name}: parity {parity.verdict}: {parity.reason}"
                sentence += _divergence_sentence(variant.divergence)
                (failures if parity.verdict == "fail" else gaps).append(sentence)
            for what, part in (("speed", variant.speed), ("placement", variant.placement)):
                if part.verdict in ("fail", "inconclusive"):
                    sentence = f"{context.name} {variant.name}: {what}: {part.reason}"
                    (failures if part.verdict == "fail" else gaps).append(sentence)
    if not contexts:
        gaps.append("the bundle has no contexts")
    for name, pairs in perplexities(contexts).items() if max_perplexity_increase is not None else ():
        measured = measured_pairs(pairs)
        if missing := sorted(pairs.keys() - measured.keys()):
            gaps.append(f"{name}: no perplexity of engine or dense baseline for {', '.join(missing)}")
            continue
        mean, dense = (mean_perplexity(side) for side in zip(*measured.values(), strict=True))
        assert max_perplexity_increase is not None
        if mean > (1 + max_perplexity_increase) * dense:
            failures.append(
                f"{name}: mean perplexity {mean:.4g} is {mean / dense - 1:.1%} above the dense baseline's {dense:.4g}; "
                f"{max_perplexity_increase:.1%} are allowed: {_advice(name)}, or allow more with "
                "--max-perplexity-increase"
            )
    # Plans, and engines of other precisions, have weights of their own; those of OpenVINO read the weights in float32.
    variants = [variant for context in contexts for variant in context.variants]
    own = [v.bytes or 0 for v in variants if v.runtime in FLAVOURS or (v.precision != "fp32" and v.runtime != OPENVINO)]
    size, dense_size = bundle.bytes - sum(own) + stored_once, bundle.dense_bytes
    if isinstance(dense_size, NotMeasured):
        gaps.append(f"bundle: {dense_size}")
    elif bundle.shared_weights and size > dense_size + len(variants) * GRAPH_BYTES:
        failures.append(f"bundle: {size:,} bytes are more than the dense model's {dense_size:,}")
    return "fail" if failures else "inconclusive" if gaps else "pass", (*failures, *gaps)


def _advice(variant: str) -> str:
    """How an engine gets better."""
    if any(variant.endswith(f"-{each}") for each in (*ROUNDED, MIXED)):
        return "calibrate the model (`cpcompile calibrate`), leave its precision out, or take one with more bits"
    return "train longer, or with larger budgets"


def perplexities(contexts: Sequence[ContextResult]) -> dict[str, dict[str, Pair]]:
    """(engine, dense) perplexity by variant and context, of all engines that ran."""
    pairs: dict[str, dict[str, Pair]] = {}
    for context in contexts:
        for variant in context.variants:
            if variant.status == "ran":
                quality = variant.quality
                pairs.setdefault(variant.name, {})[context.name] = (quality.perplexity, quality.dense_perplexity)
    return pairs


def measured_pairs(pairs: dict[str, Pair]) -> dict[str, tuple[float, float]]:
    """The pairs of which both sides were measured."""
    return {
        context: (own, dense)
        for context, (own, dense) in pairs.items()
        if not isinstance(own, NotMeasured) and not isinstance(dense, NotMeasured)
    }


def _divergence_sentence(divergence: Diagnosis | None) -> str:
    """Where the engine diverges from the model, if that was found."""
    if divergence is None or isinstance(divergence.sentence, NotMeasured):
        return ""
    repro = "" if isinstance(divergence.repro, NotMeasured) else f"; repro in {divergence.repro}"
    return f"; {divergence.sentence}{repro}"

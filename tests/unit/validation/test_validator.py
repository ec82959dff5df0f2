from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from cpcompile.bundle.reader import Bundle
from cpcompile.core.config import ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.measured import NotMeasured
from cpcompile.frontend.checkpoint import Checkpoint
from cpcompile.report.results import PlacedNode, Results, VariantResult
from cpcompile.validation.language_reference import NO_DENSE, NO_TEXT, LanguageReference
from cpcompile.validation.validator import validate as validate_against

HeldOut = Mapping[str, npt.NDArray[np.int32]]

SMALL = ValidateConfig(shapes=((1, 1), (2, 8)), speed_shapes=((1, 8),), rounds=3, threads=1)
QUICK = dataclasses.replace(SMALL, memory=False, speed=False, coherence=False)
EXPLAINED_BY_STATUS = {"reason", "bytes", "divergence"}


def validate(
    bundle: Bundle,
    checkpoint: Checkpoint,
    dense: Path | None,
    config: ValidateConfig,
    held_out: HeldOut,
    **more: Any,
) -> Results:
    reference = LanguageReference(checkpoint, dense, config, held_out=held_out, sequence=16)
    return validate_against(bundle, reference, config, **more)


def unexplained(result: Any) -> Iterator[str]:
    """Fields that are None or not measured without a reason."""
    if not dataclasses.is_dataclass(result) or isinstance(result, type | PlacedNode | NotMeasured):
        return
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if (value is None and field.name not in EXPLAINED_BY_STATUS) or value == NotMeasured(""):
            yield f"{type(result).__name__}.{field.name}"
        for item in value if isinstance(value, tuple) else (value,):
            yield from unexplained(item)


def test_everything_is_measured_for_every_engine(
    bundle: Bundle, checkpoint: Checkpoint, dense_path: Path, held_out: HeldOut
) -> None:
    steps: list[tuple[str, int, int | None]] = []
    threads = torch.get_num_threads()
    results = validate(bundle, checkpoint, dense_path, SMALL, held_out, progress=lambda *step: steps.append(step))
    assert torch.get_num_threads() == threads
    assert [step for step in steps if step[0] == "validate"] == [
        ("validate", 0, 2),
        ("validate", 1, 2),
        ("validate", 2, 2),
    ]
    parts = ("parity", "quality", "speed", "throughput", "memory")
    names = [f"validate: {part} of {context} cpu-fp32" for context in ("de", "en") for part in parts]
    assert list(dict.fromkeys(name for name, *_ in steps if name != "validate")) == names
    for name in names:  # each counts from nothing to its total, and no unit is left out
        done, totals = [step[1] for step in steps if step[0] == name], {step[2] for step in steps if step[0] == name}
        assert done == list(range(done[-1] + 1)) and totals == {done[-1]}
    engines = [(context, result) for context, own in results.items() for result in own]
    assert [(c, r.name, r.status) for c, r in engines] == [("de", "cpu-fp32", "ran"), ("en", "cpu-fp32", "ran")]
    for context, result in engines:
        assert result.parity, result.parity.reason
        assert not result.quality.not_measured
        assert -1 <= result.quality.coherence <= 1 and -1 <= result.quality.dense_coherence <= 1
        assert set(result.memory.not_measured) == {"vram_bytes"}
        assert not result.start.not_measured and min(result.start.load_ms, result.start.first_run_ms) > 0
        assert result.quality.tokens == 288
        assert result.quality.perplexity != result.quality.dense_perplexity
        assert result.memory.run_peak_rss_bytes < result.memory.eager_run_peak_rss_bytes
        assert [(s.batch, s.sequence, s.rounds) for s in result.speed.shapes] == [(1, 8, 3)]
        assert result.speed.threads == result.throughput.workers == 1
        assert result.throughput.ratio_low <= result.throughput.ratio <= result.throughput.ratio_high
        assert result.placement.verdict == "pass"
        assert result.bytes == bundle.variant(context, result.name).bytes
        assert list(unexplained(result)) == []


def test_the_engine_has_the_quality_of_its_own_eager_model(
    bundle: Bundle, checkpoint: Checkpoint, held_out: HeldOut
) -> None:
    ((de,), _) = validate(bundle, checkpoint, None, QUICK, held_out).values()
    ids = torch.from_numpy(held_out["de"][:289].astype(np.int64))
    inputs = torch.stack([ids[start : start + 16] for start in range(0, 288, 16)])
    with torch.no_grad():
        logits = checkpoint.model(inputs, torch.tensor(0)).flatten(0, 1).double()
    loss = torch.nn.functional.cross_entropy(logits, ids[1:])
    assert de.quality.perplexity == pytest.approx(loss.exp().item(), rel=1e-5)


def test_what_is_switched_off_or_missing_has_its_reason(
    bundle: Bundle, checkpoint: Checkpoint, held_out: HeldOut
) -> None:
    (de,), (en,) = validate(bundle, checkpoint, None, QUICK, {"de": held_out["de"]}).values()
    assert de.parity and de.quality.not_measured["dense_perplexity"] == NO_DENSE
    assert de.speed.not_measured["shapes"] == "speed measurements were switched off"
    assert de.memory.not_measured["run_peak_rss_bytes"] == "memory measurements were switched off"
    assert en.parity.verdict == "inconclusive" and en.parity.reason == NO_TEXT
    assert en.quality.not_measured["perplexity"] == NO_TEXT
    assert en.placement.nodes
    for result in (de, en):
        assert list(unexplained(result)) == []


def _rename_output(graph: ir.Graph) -> None:
    graph.outputs[0].name = "scores"


def _add_output(graph: ir.Graph) -> None:
    graph.outputs.append(graph.outputs[0].producer().inputs[0])


@pytest.mark.parametrize(
    ("change", "outputs"),
    [
        pytest.param(_rename_output, r"['scores']", marks=pytest.mark.slow),
        (_add_output, r"expected exactly ['logits']"),
    ],
)
def test_an_engine_with_other_outputs_fails_and_is_not_measured_further(
    change, outputs: str, make_bundle, checkpoint: Checkpoint, dense_path: Path, held_out: HeldOut
) -> None:
    ((result,),) = validate(make_bundle(change, {"de": 0}), checkpoint, dense_path, SMALL, held_out).values()
    assert result.parity.verdict == "fail" and outputs in result.parity.reason
    assert isinstance(result.quality.perplexity, NotMeasured) and isinstance(result.quality.dense_perplexity, float)
    assert isinstance(result.speed.shapes, NotMeasured)
    assert isinstance(result.memory.run_peak_rss_bytes, NotMeasured)
    assert list(unexplained(result)) == []


def test_the_engine_of_another_context_fails_with_numbers(
    make_bundle, checkpoint: Checkpoint, held_out: HeldOut
) -> None:
    ((result,),) = validate(make_bundle(None, {"de": 1}), checkpoint, None, QUICK, held_out).values()
    assert result.parity.verdict == "fail" and "exceeds the tolerance" in result.parity.reason
    assert result.parity.max_abs_error > result.parity.tolerance
    assert isinstance(result.quality.perplexity, float)


def test_a_bundle_of_another_checkpoint_is_refused(make_bundle, checkpoint: Checkpoint, held_out: HeldOut) -> None:
    with pytest.raises(UsageError, match=r"has the context 'fr', the model de, en"):
        validate(make_bundle(None, {"fr": 0}), checkpoint, None, QUICK, held_out)


def test_a_skipped_engine_has_one_reason_for_everything() -> None:
    result = VariantResult.not_run(
        name="tensorrt-fp16",
        runtime="tensorrt",
        precision="fp16",
        status="skipped",
        reason="tensorrt is not installed",
    )
    assert list(unexplained(result)) == []
    assert set(result.quality.not_measured.values()) >= {"tensorrt is not installed"}

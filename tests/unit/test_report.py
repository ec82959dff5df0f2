from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from cpcompile.errors import CpcompileError
from cpcompile.measure import ProcessMemory, environment
from cpcompile.report import (
    SCHEMA,
    BuildResult,
    BuildStage,
    ContextResult,
    controls_table,
    judge,
    make_report,
    mean_perplexity,
    render_report,
    training_summary,
    write_report,
)
from cpcompile.validation.memory import compare_memory
from cpcompile.validation.parity import Parity
from cpcompile.validation.placement import PlacedNode, Placement
from cpcompile.validation.quality import Score, compare_quality
from cpcompile.validation.speed import ShapeSpeed, Speed
from cpcompile.validation.validator import VariantResult

VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))

TRAINING = {
    "perplexity": {"dense-baseline": {"de": 20.0, "en": 30.0}, "partition": {"de": 19.0, "en": 29.0}},
    "controls": {
        "small-dense": {"description": "a dense model of the active size", "perplexity": {"de": 18.0, "en": 28.0}},
        "one-mask": {"description": "one selection for all", "perplexity": {"de": 19.01, "en": 29.01}},
    },
    "swap_matrix": {"contexts": ["de", "en"], "perplexity": [[19.0, 40.0], [35.0, 29.0]]},
}


def variant(context: str = "de", *, perplexity: float = 19.0, dense: float | str = 20.0) -> VariantResult:
    """An engine about which everything is known."""
    return VariantResult(
        context=context,
        name="cpu-fp32",
        runtime="onnxruntime",
        precision="fp32",
        bytes=1_000_000,
        status="ran",
        reason=None,
        parity=Parity(
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
            Score(perplexity=perplexity, accuracy=0.3, tokens=100),
            Score(perplexity=dense, accuracy=0.25, tokens=100) if isinstance(dense, float) else dense,
        ),
        memory=compare_memory(
            *(
                ProcessMemory(base_rss_bytes=b, load_peak_rss_bytes=2 * b, run_peak_rss_bytes=3 * b)
                for b in (50_000_000, 200_000_000)
            )
        ),
        speed=Speed(
            shapes=(
                ShapeSpeed(
                    batch=1,
                    sequence=128,
                    p50_ms=1.0,
                    p90_ms=1.1,
                    p99_ms=1.2,
                    eager_p50_ms=3.0,
                    eager_p90_ms=3.1,
                    eager_p99_ms=3.2,
                    ratio=3.0,
                    ratio_low=2.9,
                    ratio_high=3.1,
                    rounds=60,
                ),
                ShapeSpeed(
                    batch=1,
                    sequence=1,
                    p50_ms=0.25,
                    p90_ms=0.3,
                    p99_ms=0.4,
                    rounds=60,
                    not_measured={"ratio": "there is no dense baseline"},
                ),
            ),
            threads=2,
        ),
        placement=Placement(
            nodes=(PlacedNode(name="MatMul_0", operator="MatMul", provider="CPUExecutionProvider", precision="float"),),
            providers={"CPUExecutionProvider": 1},
            operators={"MatMul": 1},
            precisions={"float": 1},
        ),
    )


def skipped(context: str = "de") -> VariantResult:
    return VariantResult.not_run(
        context=context,
        name="tensorrt-fp16",
        runtime="tensorrt",
        precision="fp16",
        status="skipped",
        reason="tensorrt [the library] is not installed",
    )


def report(*variants: VariantResult, bundle_bytes: int = 9, dense_bytes: int | None = 10) -> dict[str, Any]:
    parameters = {"total": 4_000_000, "kept": 1_000_000, "removed": 3_000_000, "removed_by_kind": {"ffn": 3_000_000}}
    parameters["removed_experts"] = {}
    contexts = dict.fromkeys(v.context for v in variants)
    return make_report(
        model={"name": "model", "architecture": "decoder", "config": {"width": 64, "tied": True}},
        environment=environment(),
        build=BuildResult(seconds=12.5, peak_rss_bytes=300_000_000, stages=(BuildStage(name="capture", seconds=3.0),)),
        bundle_bytes=bundle_bytes,
        dense_bytes=dense_bytes,
        shared_weights=True,
        contexts=[
            ContextResult(name=c, parameters=parameters, variants=[v for v in variants if v.context == c])
            for c in contexts
        ],
        training=training_summary(TRAINING, ("de", "en")),
        max_perplexity_increase=0.01,
    )


def complete() -> dict[str, Any]:
    return report(variant(), skipped(), variant("en", perplexity=29.0, dense=30.0))


def text_of(renderable: Any, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_a_complete_report_fits_the_schema_and_passes() -> None:
    VALIDATOR.check_schema(VALIDATOR.schema)
    VALIDATOR.validate(complete())
    assert complete()["verdict"] == "pass" and complete()["reasons"] == []


def test_the_report_survives_its_file(tmp_path: Path) -> None:
    path = write_report(complete(), tmp_path)
    assert path == tmp_path / "report.json"
    assert json.loads(path.read_text(encoding="utf-8")) == complete()
    write_report(report(skipped()), tmp_path)
    assert json.loads(path.read_text(encoding="utf-8"))["verdict"] == "inconclusive"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_report(complete(), tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report({**complete(), "verdict": float("nan")}, tmp_path)
    assert json.loads(path.read_text(encoding="utf-8")) == complete()
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    (tmp_path / "other" / "report.json").mkdir(parents=True)
    with pytest.raises(CpcompileError, match="is a folder"):
        write_report(complete(), tmp_path / "other")


MAPS = {
    "config",
    "removed_by_kind",
    "removed_experts",
    "not_measured",
    "providers",
    "operators",
    "precisions",
    "controls",
    "perplexity",
}
"""Objects whose keys are data."""
NULLABLE = {"training", "swap_matrix", "providers", "operators", "precisions"}
"""Objects that may be absent."""


def objects(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every object in a report whose keys the schema fixes, with its path."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from objects(item, (*path, index))
    elif isinstance(node, dict):
        if not path or path[-1] not in MAPS:
            yield path, node
        for key, value in node.items():
            yield from objects(value, (*path, key))


def changed(path: tuple[Any, ...], change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    whole = complete()
    node: Any = whole
    for step in path:
        node = node[step]
    change(node)
    return whole


def test_the_schema_rejects_every_missing_and_every_additional_key() -> None:
    tried = 0
    for path, node in objects(complete()):
        for key in node:
            assert not VALIDATOR.is_valid(changed(path, lambda n, key=key: n.pop(key))), (path, key)
            tried += 1
        assert not VALIDATOR.is_valid(changed(path, lambda n: n.update(surprise=1))), path
    assert tried > 150


def test_the_schema_rejects_every_wrong_type() -> None:
    for path, node in objects(complete()):
        for key, value in node.items():
            assert not VALIDATOR.is_valid(changed(path, lambda n, key=key: n.update({key: [[[]]]}))), (path, key)
            if isinstance(value, dict) and key not in NULLABLE:
                assert not VALIDATOR.is_valid(changed(path, lambda n, key=key: n.update({key: None}))), (path, key)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ((), "schema_version", 2),
        ((), "verdict", "maybe"),
        (("bundle",), "bytes", None),
        (("contexts", 0), "name", "Not A Context"),
        (("contexts", 0, "parameters"), "kept", -1),
        (("contexts", 0, "variants", 0), "status", "perhaps"),
        (("contexts", 0, "variants", 0, "parity"), "verdict", None),
        (("contexts", 0, "variants", 0, "parity"), "top1_agreement", 1.5),
        (("contexts", 0, "variants", 0, "quality"), "perplexity", 0),
        (("contexts", 0, "variants", 0, "speed", "shapes", 0), "p50_ms", 0),
        (("contexts", 0, "variants", 0, "speed", "shapes", 0), "p50_ms", None),
        (("contexts", 0, "variants", 0, "speed", "shapes", 0), "rounds", 2.5),
        (("environment",), "cores", 0),
    ],
)
def test_the_schema_rejects_wrong_values(path: tuple[Any, ...], key: str, value: object) -> None:
    assert not VALIDATOR.is_valid(changed(path, lambda node: node.update({key: value})))


def edit(path: tuple[Any, ...], **values: object) -> Callable[[dict[str, Any]], None]:
    def apply(whole: dict[str, Any]) -> None:
        node: Any = whole
        for step in path:
            node = node[step]
        node.update(values)

    return apply


DE = ("contexts", 0, "variants", 0)


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        (edit((*DE, "parity"), verdict="fail", reason="NaN"), "fail", "de cpu-fp32: parity fail: NaN"),
        (
            edit((*DE, "parity"), verdict="inconclusive", reason="no text"),
            "inconclusive",
            "parity inconclusive: no text",
        ),
        (edit((*DE, "quality"), perplexity=20.0), "pass", None),
        # sqrt(20.41 * 29) against sqrt(20 * 30): 0.68 % below; sqrt(22 * 29): 3.1 % above; 1 % is allowed.
        (edit((*DE, "quality"), perplexity=20.41), "pass", None),
        (edit((*DE, "quality"), perplexity=22.0), "fail", "3.1% above the dense baseline's 24.49; 1.0% are allowed"),
        (edit((*DE, "quality"), perplexity=None), "inconclusive", "no perplexity of engine or dense baseline for de"),
        (edit((*DE, "quality"), dense_perplexity=None), "inconclusive", "no perplexity of engine or dense baseline"),
        (edit(DE, status="built", reason="no GPU"), "inconclusive", "de: no engine of this context ran"),
        (edit(("bundle",), bytes=10), "pass", None),
        (edit(("bundle",), bytes=9_000_000), "fail", "bundle: 9,000,000 bytes are more than the dense model's 10"),
        (edit((), contexts=[]), "inconclusive", "the bundle has no contexts"),
    ],
)
def test_verdict(change: Callable[[dict[str, Any]], None], verdict: str, reason: str | None) -> None:
    whole = complete()
    change(whole)
    actual, reasons = judge(whole, 0.01)
    assert actual == verdict
    assert (reasons == []) if reason is None else (len(reasons) == 1 and reason in reasons[0]), reasons


def test_a_failure_outweighs_a_gap_and_both_are_told() -> None:
    both = report(variant(dense="no baseline"), bundle_bytes=200_011, dense_bytes=10)
    assert both["verdict"] == "fail"
    assert len(both["reasons"]) == 2
    VALIDATOR.validate(both)


def test_an_unknown_size_of_the_dense_model_is_inconclusive() -> None:
    unknown = report(variant(), dense_bytes=None)
    assert unknown["verdict"] == "inconclusive"
    assert unknown["reasons"] == ["bundle: the size of the dense model is unknown"]
    VALIDATOR.validate(unknown)


def test_every_variant_is_judged_by_its_own_mean() -> None:
    """A good variant does not make up for a bad one."""
    whole = complete()
    for context in whole["contexts"]:
        worse = copy.deepcopy(context["variants"][0])
        worse["name"] = "cpu-int8"
        worse["quality"]["perplexity"] *= 1.5
        context["variants"].append(worse)
    verdict, reasons = judge(whole, 0.01)
    assert verdict == "fail"
    assert len(reasons) == 1 and reasons[0].startswith("cpu-int8: mean perplexity")


def test_the_mean_perplexity_is_that_of_the_mean_loss() -> None:
    assert mean_perplexity([4.0, 9.0]) == pytest.approx(6.0, rel=1e-12)


def test_findings_say_which_branch_wins() -> None:
    summary = training_summary(TRAINING, ("de", "en"))
    assert summary is not None
    assert list(summary["controls"]) == ["dense-baseline", "partition", "small-dense", "one-mask"]
    assert summary["controls"]["partition"]["mean_perplexity"] == pytest.approx((19 * 29) ** 0.5, rel=1e-12)
    dense, small, one, best, swap = summary["findings"]
    assert dense.startswith("The partitioned model beats dense-baseline (") and dense.endswith("(-4.2%).")
    assert small.startswith("The partitioned model loses to small-dense (") and small.endswith("(+4.6%).")
    assert one.startswith("The partitioned model cannot be told apart from one-mask (")
    assert best == "The lowest mean perplexity is that of small-dense: 22.45."
    assert swap.startswith("Every context does best with its own units")


def test_findings_name_the_context_that_is_better_off_elsewhere() -> None:
    swapped = {**TRAINING, "swap_matrix": {"contexts": ["de", "en"], "perplexity": [[19.0, 18.0], [25.0, 29.0]]}}
    summary = training_summary(swapped, ("de", "en"))
    assert summary is not None
    assert summary["findings"][-2:] == [
        "Text of de does better with the units of en (18) than with its own (19).",
        "Text of en does better with the units of de (25) than with its own (29).",
    ]


def test_training_results_are_optional() -> None:
    assert training_summary({}, ("de",)) is None
    bare = training_summary({"perplexity": {"dense-baseline": {"de": 20.0}}}, ("de",))
    assert bare is not None and bare["swap_matrix"] is None and bare["findings"] == []
    for training in (None, bare):
        VALIDATOR.validate({**complete(), "training": training})
    assert "records no training results" in text_of(controls_table(None))


def test_the_terminal_shows_what_the_report_holds() -> None:
    text = text_of(render_report(complete()))
    for part in (
        "of 4.00 M",
        "25%",
        "of 1.6e-05",
        "dense 20.00",
        "150.0 MB",
        "600.0 MB",
        "1×128: 3.00 (2.90–3.10)",
        "1×1: 0.25 ms",
        "tensorrt [the library] is not installed",
        "loses to small-dense",
        "built in 12.5 s, peak 300.0 MB",
        "verdict: pass",
    ):
        assert part in text, part
    failed = text_of(render_report(report(variant(), bundle_bytes=200_011)))
    assert "verdict: fail" in failed and "200,011 bytes are more than" in failed


def test_no_sentence_is_lost_on_a_narrow_terminal() -> None:
    words = text_of(render_report(complete()), width=80).split()
    for finding in complete()["training"]["findings"]:
        assert " ".join(finding.split()) in " ".join(words)

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest

from cpcompile.core.json_form import to_json
from cpcompile.core.measured import NotMeasured
from cpcompile.report import SCHEMA, judge, make_report, mean_perplexity, summarize_training
from tests.unit.report.reports import TRAINING, Engine, arguments, as_report, complete, report, variant

VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def test_a_complete_report_fits_the_schema_and_passes() -> None:
    VALIDATOR.check_schema(VALIDATOR.schema)
    VALIDATOR.validate(complete())
    assert complete()["verdict"] == "pass" and complete()["reasons"] == []


MAPS = {
    "peers",
    "config",
    "removed_by_kind",
    "removed_experts",
    "kinds",
    "kept",
    "not_measured",
    "providers",
    "operators",
    "precisions",
    "controls",
    "perplexity",
    "p50_ms",
    "rounded",
}
"""Objects whose keys are data."""
OPTIONAL = {"cache", "search", "conditions", "kept", "openvino", "tensorrt", "tensorrt_rtx"}
"""Keys that reports from before do not have; the last three are left out where those are not installed, too."""
NULLABLE = {"cache", "search", "training", "kinds", "swap_matrix", "providers", "operators", "precisions"}
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
        for key in node.keys() - OPTIONAL:
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
        ((), "schema_version", 1),
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
        (("contexts", 0, "variants", 0, "speed", "shapes", 0), "quantiles_ms", [1.0] * 20),
        (("selection", "kinds", "ffn", 0, "kept"), "de", "1o"),
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
    made = as_report(whole)
    actual, reasons = judge(made.contexts, made.bundle, 0.01)
    assert actual == verdict
    assert (reasons == ()) if reason is None else (len(reasons) == 1 and reason in reasons[0]), reasons


def test_a_failure_outweighs_a_gap_and_both_are_told() -> None:
    both = report(variant(dense="no baseline"), bundle_bytes=200_011, dense_bytes=10)
    assert both["verdict"] == "fail"
    assert len(both["reasons"]) == 2
    VALIDATOR.validate(both)


def test_openvino_engines_read_the_shared_weights() -> None:
    """Their sizes contain them; a bundle that is too large does not become small with more of such engines."""
    whole = complete()
    for precision in ("fp32", "bf16"):
        more = {"name": f"openvino-{precision}", "runtime": "openvino", "precision": precision, "bytes": 9_000_000}
        whole["contexts"][0]["variants"].append(whole["contexts"][0]["variants"][0] | more)
    whole["bundle"]["bytes"] = 9_000_000
    made = as_report(whole)
    verdict, reasons = judge(made.contexts, made.bundle, 0.01)
    assert verdict == "fail" and "9,000,000 bytes are more than the dense model's" in reasons[0]


def test_plans_are_no_shared_weights_and_no_pass() -> None:
    plan = Engine.not_run(
        name="tensorrt-rtx-fp16",
        runtime="tensorrt-rtx",
        precision="fp16",
        status="built",
        reason="built, not run: no NVIDIA GPU",
        bytes=9_000_000,
    )
    both = report(variant(), plan, bundle_bytes=9_000_009, dense_bytes=10)
    assert both["verdict"] == "pass" and both["contexts"][0]["variants"][1]["parity"]["verdict"] == "inconclusive"
    alone = report(plan, bundle_bytes=9_000_009, dense_bytes=10)
    assert (alone["verdict"], alone["reasons"]) == ("inconclusive", ["no engine ran: built, not run: no NVIDIA GPU"])
    VALIDATOR.validate(both)


def test_an_unknown_size_of_the_dense_model_is_inconclusive() -> None:
    unknown = report(variant(), dense_bytes=None)
    assert unknown["verdict"] == "inconclusive"
    assert unknown["reasons"] == ["bundle: the size of the dense model is unknown"]
    VALIDATOR.validate(unknown)


def test_a_selection_that_is_unknown_says_why() -> None:
    unknown = to_json(make_report(**{**arguments(variant()), "selection": NotMeasured("an old program")}))
    assert unknown["selection"] == {"kinds": None, "not_measured": {"kinds": "an old program"}}
    VALIDATOR.validate(unknown)


def test_only_contexts_of_the_report_are_in_its_selection() -> None:
    kinds = report(variant())["selection"]["kinds"]
    assert kinds["head"] == [{"name": "layer 0", "kept": {"de": "10"}}]


def test_every_variant_is_judged_by_its_own_mean() -> None:
    """A good variant does not make up for a bad one."""
    whole = complete()
    for context in whole["contexts"]:
        worse = copy.deepcopy(context["variants"][0])
        worse["name"] = "cpu-int8"
        worse["quality"]["perplexity"] *= 1.5
        context["variants"].append(worse)
    made = as_report(whole)
    verdict, reasons = judge(made.contexts, made.bundle, 0.01)
    assert verdict == "fail"
    assert len(reasons) == 1 and reasons[0].startswith("cpu-int8: mean perplexity")


def test_the_mean_perplexity_is_that_of_the_mean_loss() -> None:
    assert mean_perplexity([4.0, 9.0]) == pytest.approx(6.0, rel=1e-12)


def test_findings_say_which_branch_wins() -> None:
    summary = summarize_training(TRAINING, ("de", "en"))
    assert summary is not None
    assert list(summary.controls) == ["dense-baseline", "partition", "small-dense", "one-mask"]
    assert summary.controls["partition"].mean_perplexity == pytest.approx((19 * 29) ** 0.5, rel=1e-12)
    dense, small, one, best, swap = summary.findings
    assert dense.startswith("The partitioned model beats dense-baseline (") and dense.endswith("(-4.2%).")
    assert small.startswith("The partitioned model loses to small-dense (") and small.endswith("(+4.6%).")
    assert one.startswith("The partitioned model cannot be told apart from one-mask (")
    assert best == "The lowest mean perplexity is that of small-dense: 22.45."
    assert swap.startswith("Every context does best with its own units")


def findings(settings: dict[str, object], **more: dict[str, float]) -> tuple[str, ...]:
    controls = {name: {"description": name, "perplexity": values} for name, values in more.items()}
    perplexity = {"dense-baseline": {"de": 20.0}, "partition": {"de": 18.0}}
    summary = summarize_training({"perplexity": perplexity, "controls": controls, "settings": settings}, ("de",))
    assert summary is not None
    assert summary.distilled is (settings == DISTILLED)
    return summary.findings


DISTILLED = {"distill": 0.5, "steps": 1000, "held_out_tokens": 4096}


def test_a_distilled_model_is_not_said_to_beat_what_is_not_distilled() -> None:
    """A gain over the dense baseline may be the distillation's alone."""
    (alone,) = findings(DISTILLED)
    assert alone == (
        "The partitioned model is distilled, dense-baseline (the dense parent trained on, ungated, for the same tokens "
        "and schedule) is not: mean perplexity 18 against 20 (-10.0%). How much of the difference is due to the "
        "distillation is not known; --controls dense-distilled measures it."
    )
    found = findings(DISTILLED, **{"dense-distilled": {"de": 17.0}, "small-dense": {"de": 19.0}})
    assert found[0].endswith("(-10.0%). Like for like, compare with dense-distilled.")
    assert found[1].startswith("The partitioned model loses to dense-distilled (")
    assert found[2].endswith("--controls small-dense-distilled measures it.")
    assert found[3] == "The lowest mean perplexity is that of dense-distilled: 17."
    assert not any("beats" in each for each in found)


@pytest.mark.parametrize("settings", [{}, {"distill": 0.0, "steps": 1000}, {"distill": 0.5, "steps": 0}])
def test_without_distillation_the_comparison_is_fair(settings: dict[str, object]) -> None:
    assert findings(settings)[0].startswith("The partitioned model beats dense-baseline (")


def test_a_model_that_loses_in_spite_of_its_distillation_loses() -> None:
    lost = {"perplexity": {"dense-baseline": {"de": 17.0}, "partition": {"de": 18.0}}, "settings": DISTILLED}
    summary = summarize_training(lost, ("de",))
    assert summary is not None and summary.findings[0].startswith("The partitioned model loses to dense-baseline (")


def test_findings_name_the_context_that_is_better_off_elsewhere() -> None:
    swapped = {**TRAINING, "swap_matrix": {"contexts": ["de", "en"], "perplexity": [[19.0, 18.0], [25.0, 29.0]]}}
    summary = summarize_training(swapped, ("de", "en"))
    assert summary is not None
    assert summary.findings[-2:] == (
        "Text of de does better with the units of en (18) than with its own (19).",
        "Text of en does better with the units of de (25) than with its own (29).",
    )


def test_a_sample_of_the_swap_matrix_says_that_it_is_one() -> None:
    matrix = {"contexts": ["de", "en", "fr"], "perplexity": [[19.0, None, 20.0], [30.0, 29.0, None], [None, 9.0, 8.0]]}
    contexts = ("de", "en", "fr")
    training = {"perplexity": {"partition": dict.fromkeys(contexts, 20.0)}, "swap_matrix": matrix}
    summary = summarize_training(training, contexts)
    assert summary is not None and summary.swap_matrix is not None and summary.swap_matrix.tried == 1
    assert summary.findings[-1] == (
        "Every context does best with its own units, compared with those of 1 of the 2 others."
    )
    matrix["perplexity"][0][2] = 18.0
    summary = summarize_training(training, contexts)
    assert summary is not None
    assert summary.findings[-1] == "Text of de does better with the units of fr (18) than with its own (19)."


def test_training_results_are_optional() -> None:
    assert summarize_training({}, ("de",)) is None
    bare = summarize_training({"perplexity": {"dense-baseline": {"de": 20.0}}}, ("de",))
    assert bare is not None and bare.swap_matrix is None and bare.findings == ()
    for training in (None, bare):
        VALIDATOR.validate({**complete(), "training": to_json(training)})

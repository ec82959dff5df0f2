"""What a change of every value leads to."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcompile.check.baseline import BUNDLE, MEASURED_AGAIN, Measured, Snapshot, Value
from cpcompile.check.criteria import NEEDS_MODEL, Check, Outcome, differences, doubtful, judge, left_out
from cpcompile.core.check_config import CheckConfig, MaxDecrease, MaxIncrease
from tests.unit.check.snapshots import ENGINE, changed, counted, judged, snapshot

CONFIG = CheckConfig()


def outcome(now: Snapshot, name: str, config: CheckConfig = CONFIG, waived: tuple[str, ...] = ()) -> Outcome:
    """The outcome for the only engine, or for the bundle."""
    (found,) = [each for each in judge(snapshot(), now, config, waived=waived) if each.name == name]
    return found


def verdict_of(now: Snapshot, waived: tuple[str, ...] = ()) -> str:
    outcomes = judge(snapshot(), now, CONFIG, waived=waived)
    return Check(subject="b", baseline="f", environment={}, outcomes=outcomes).verdict


def test_nothing_changed() -> None:
    assert {each.verdict for each in judge(snapshot(), snapshot(), CONFIG)} == {"pass"}
    assert verdict_of(snapshot()) == "pass"


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("perplexity", 20.2, "pass"),
        ("perplexity", 20.201, "fail"),
        ("perplexity", 1.0, "pass"),
        ("accuracy", 0.39, "pass"),
        ("accuracy", 0.3899, "fail"),
        ("bytes", 4_040_000, "pass"),
        ("bytes", 4_040_001, "fail"),
        ("memory", 89_000_000, "fail"),
        ("memory", 88_000_000, "pass"),
        ("private_memory", 80_000_000, "fail"),
        ("parity_error", 0.4, "pass"),
        ("parity_error", 0.41, "fail"),
        ("parity_error", 0.0, "pass"),
    ],
)
def test_each_limit(name: str, value: float, verdict: str) -> None:
    assert outcome(changed(**{name: value}), name).verdict == verdict


@pytest.mark.parametrize(
    ("low", "value", "high", "verdict"),
    [
        (2.9, 2.95, 3.0, "pass"),
        (2.5, 2.71, 2.9, "inconclusive"),
        (1.9, 2.0, 2.1, "fail"),
        (1.0, 4.0, 9.0, "inconclusive"),
        (4.0, 5.0, 6.0, "pass"),
    ],
)
def test_a_ratio_of_speeds_is_judged_by_its_interval(low: float, value: float, high: float, verdict: str) -> None:
    found = outcome(changed(speed_ratio=Value(value=value, low=low, high=high)), "speed_ratio[1x128]")
    assert found.verdict == verdict
    assert found.change == pytest.approx(value / 3 - 1)


def test_a_slow_engine_on_a_busy_machine_is_inconclusive() -> None:
    slow = Value(value=2.0, low=1.9, high=2.1, interference="other processes took 50% of the processors")
    found = outcome(changed(speed_ratio=slow), "speed_ratio[1x128]")
    assert found.verdict == "inconclusive"
    assert found.reason == "beyond the limit, but while other processes took 50% of the processors"


def test_limits_are_settings() -> None:
    config = CheckConfig(perplexity=MaxIncrease(max_increase=0.5), speed_ratio=MaxDecrease(max_decrease=0.5))
    assert outcome(changed(perplexity=29.0), "perplexity", config).verdict == "pass"
    slow = changed(speed_ratio=Value(value=2.0, low=1.9, high=2.1))
    assert outcome(slow, "speed_ratio[1x128]", config).verdict == "pass"


def test_what_was_not_measured_is_never_a_pass() -> None:
    found = outcome(changed(perplexity=None), "perplexity")
    assert (found.verdict, found.reason) == ("not measured", "nobody looked")
    assert found.sentence == "nobody looked (20 in the baseline)"
    assert verdict_of(changed(perplexity=None)) == "inconclusive"
    assert verdict_of(changed(perplexity=None), waived=NEEDS_MODEL) == "pass"


def test_a_baseline_says_what_it_holds_nothing_on() -> None:
    assert left_out(snapshot()) == {}
    assert left_out(changed(perplexity=None)) == {"perplexity": "nobody looked"}
    plan = {("de", "plan"): Measured(not_measured={"perplexity": "no GPU", "parity": "no GPU"})}
    beside = dataclasses.replace(changed(perplexity=None), places=changed(perplexity=None).places | plan)
    assert left_out(beside) == {"perplexity": "nobody looked"}


def test_engines_that_come_and_go() -> None:
    other = snapshot(place=("en", "cpu-fp32"))
    found = {(each.place, each.name): each.verdict for each in judge(snapshot(), other, CONFIG)}
    assert found["de cpu-fp32", "present"] == "fail"
    assert found["en cpu-fp32", "present"] == found["en cpu-fp32", "perplexity"] == "new"


def test_a_new_engine_must_compute_the_right_thing() -> None:
    engine = Measured(verdicts={"parity": ("fail", "logits differ")})
    now = Snapshot(**{**vars(snapshot()), "places": {**snapshot().places, ("en", "cpu-fp32"): engine}})
    found = [each for each in judge(snapshot(), now, CONFIG) if each.verdict == "fail"]
    assert [(each.place, each.name, each.sentence) for each in found] == [
        ("en cpu-fp32", "parity", "fail, nothing in the baseline: logits differ")
    ]


def test_parity_is_what_the_validator_says() -> None:
    assert outcome(judged("fail", "logits differ"), "parity").verdict == "fail"
    assert outcome(judged("inconclusive", "no inputs"), "parity").verdict == "inconclusive"


def test_more_operators_are_named() -> None:
    found = outcome(counted(operators={"MatMul": 100, "Add": 70, "Cast": 30}), "nodes")
    assert (found.verdict, found.reason) == ("fail", "more Cast (+30)")
    assert outcome(counted(operators={"MatMul": 100, "Add": 80}), "nodes").verdict == "pass"


@pytest.mark.parametrize(
    "counts",
    [
        {"providers": {"CPUExecutionProvider": 100, "CUDAExecutionProvider": 70}},
        {"precisions": {"float": 100, "float16": 60, "int64_t": 10}},
    ],
)
def test_nodes_that_run_elsewhere_fail(counts: dict[str, dict[str, int]]) -> None:
    found = outcome(counted(**counts), "placement")
    assert found.verdict == "fail" and "in the baseline none" in found.sentence


def test_nothing_to_something_is_no_number() -> None:
    before = changed(parity_error=0.0)
    (found,) = [each for each in judge(before, changed(parity_error=0.2), CONFIG) if each.name == "parity_error"]
    assert (found.verdict, found.change) == ("fail", None)


def test_what_else_differs_is_noted() -> None:
    plain = vars(snapshot())
    now = Snapshot(**{**plain, "config": {"width": 256}, "environment": {"cpu": "b", "versions": {"torch": "3"}}})
    assert differences(snapshot(), snapshot()) == ()
    assert differences(snapshot(), now) == (
        "the model's setting width: 256, in the baseline 128",
        "the environment's cpu: b, in the baseline a",
        "the version of torch: 3, in the baseline 2",
    )


def test_only_noisy_misses_are_worth_measuring_again() -> None:
    now = changed(perplexity=30.0, memory=200_000_000, speed_ratio=Value(value=1.0, low=0.9, high=1.1))
    assert doubtful(judge(snapshot(), now, CONFIG), MEASURED_AGAIN) == {ENGINE: {"memory", "speed_ratio"}}


def test_a_second_measurement_replaces_ratios_and_widens_peaks() -> None:
    now = changed(memory=200_000_000, speed_ratio=Value(value=1.0, low=0.9, high=1.1))
    values = {
        "memory": Value(value=81_000_000),
        "private_memory": Value(value=41_000_000),
        "speed_ratio[1x128]": Value(value=3.0, low=2.9, high=3.1),
    }
    again = now.again(ENGINE, Measured(values=values), "a noise")
    assert again.places[ENGINE].values["memory"] == Value(value=81_000_000, low=81_000_000, high=200_000_000)
    assert again.places[ENGINE].values["speed_ratio[1x128]"].interference == "a noise"
    assert outcome(again, "memory").verdict == "inconclusive"
    assert outcome(again, "speed_ratio[1x128]").verdict == "pass"


positive = st.floats(0.01, 100)


@given(before=positive, now=positive, width=st.floats(1, 2), other=st.floats(1, 2))
def test_the_interval_of_a_change_holds_it_and_grows_with_both_sides(
    before: float, now: float, width: float, other: float
) -> None:
    """Exact values give exact changes, and no interval is narrower than that of either side."""
    old = changed(speed_ratio=Value(value=before, low=before / other, high=before * other))
    new = changed(speed_ratio=Value(value=now, low=now / width, high=now * width))
    (found,) = [each for each in judge(old, new, CONFIG) if each.criterion == "speed_ratio"]
    assert found.change is not None and found.change_low is not None and found.change_high is not None
    assert found.change_low <= found.change + 1e-9 and found.change <= found.change_high + 1e-9
    widest = max(math.log(width), math.log(other))
    assert math.log((1 + found.change_high) / (1 + found.change)) >= widest - 1e-6
    assert math.log((1 + found.change_high) / (1 + found.change)) <= math.log(width) + math.log(other) + 1e-6


def test_the_bundle_is_a_place_too() -> None:
    places = {**snapshot().places, BUNDLE: Measured(values={"bundle_bytes": Value(value=6_000_000)})}
    found = outcome(Snapshot(**{**vars(snapshot()), "places": places}), "bundle_bytes")
    assert (found.place, found.verdict) == ("bundle", "fail")
    assert found.sentence == "6.000 MB, 5.000 MB in the baseline, +20 %, allowed +1 %"


def test_an_interval_as_wide_as_floats_go_decides_nothing() -> None:
    memory = Value(value=1.0, low=5e-324, high=1.7e308)
    (found,) = [each for each in judge(changed(memory=memory), snapshot(), CONFIG) if each.name == "memory"]
    assert found.verdict == "inconclusive"
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_what_is_said_of_an_engine_is_no_command_of_a_terminal() -> None:
    place = {ENGINE: Measured(verdicts={"parity": ("fail", "the outputs are a\x1b[2J\n::error::boo")})}
    now = dataclasses.replace(snapshot(), config={"name": "a\x1b]0;b\x07"}, places=snapshot().places | place)
    texts = [each.sentence for each in judge(snapshot(), now, CONFIG)] + list(differences(snapshot(), now))
    assert len(texts) > 5 and all(text.isprintable() for text in texts)

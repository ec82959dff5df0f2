from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.json_form import to_json
from cpcompile.core.measured import NotMeasured
from cpcompile.report import compare_reports, read_report, write_report
from tests.unit.report.reports import as_report, complete, report, skipped


def test_the_report_survives_its_file(tmp_path: Path) -> None:
    path = write_report(as_report(complete()), tmp_path)
    assert path == tmp_path / "report.json"
    assert read_report(path) == read_report(tmp_path) == as_report(complete())
    write_report(as_report(report(skipped())), tmp_path)
    assert read_report(path).verdict == "inconclusive"
    assert ">Inconclusive</strong>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.html"}


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_report(as_report(complete()), tmp_path)
    page = (tmp_path / "report.html").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(dataclasses.replace(as_report(complete()), verdict=float("nan")), tmp_path)
    assert read_report(path) == as_report(complete()) and (tmp_path / "report.html").read_bytes() == page
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.html"}
    (tmp_path / "other" / "report.json").mkdir(parents=True)
    with pytest.raises(CpcompileError, match="is a folder"):
        write_report(as_report(complete()), tmp_path / "other")


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    content = complete()
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not complete JSON"),
        (json.dumps(complete())[:3000], "is not complete JSON"),
        ("[" * 100_000, "is not complete JSON"),
        ("[1, 2]", "is not a report of cpcompile; give a bundle or its report.json"),
        ('{"schema_version": "1.0", "components": {}}', "is not a report of cpcompile"),
        (edited(lambda r: r.update(schema_version=7)), "has schema version 7, this cpcompile reads 2"),
        (edited(lambda r: r.pop("verdict")), "'verdict' is a required property"),
        (edited(lambda r: r["build"].update(seconds=float("nan"))), "NaN is not a number"),
        (edited(lambda r: r["build"].update(seconds=1)).replace('"seconds": 1,', '"seconds": 1e999,'), "1e999 is no"),
        (edited(lambda r: r["bundle"].update(bytes=10**30)), "is too large"),
        (edited(lambda r: r["contexts"].append(r["contexts"][0])), "a context occurs twice"),
        (edited(lambda r: r["selection"]["kinds"]["ffn"][0]["kept"].pop("de")), "layer 0 does not give a digit"),
        (edited(lambda r: r["selection"]["kinds"]["ffn"][0]["kept"].update(de="1")), "layer 0 does not give a digit"),
        (edited(lambda r: r["training"].update(controls={})), "the branches have no perplexities"),
        (edited(lambda r: r["training"]["swap_matrix"]["perplexity"].pop()), "the swap matrix is not square"),
        (
            edited(lambda r: r["training"]["swap_matrix"]["perplexity"][1].__setitem__(1, None)),
            "not have the own units",
        ),
    ],
)
def test_what_is_no_report_is_refused_with_the_reason(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"report\.json: ") as caught:
        read_report(path)
    assert message in str(caught.value)


def test_a_report_of_an_engine_without_a_cache_may_leave_the_cache_out(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(edited(lambda r: [context.pop("cache", None) for context in r["contexts"]]), encoding="utf-8")
    assert [context.cache for context in read_report(path).contexts] == [None, None]


def test_a_report_that_is_not_there_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file; `cpcompile validate` writes one"):
        read_report(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not complete JSON"):
        read_report(tmp_path / "bytes")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_report_with_anything_in_any_place_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """What is read can be compared like any other, and is the same when it is written and read again."""
    content = complete()
    node: Any = content
    for _ in range(data.draw(st.integers(0, 7))):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not (inner := [key for key in keys if isinstance(node[key], dict | list) and node[key]]):
            break
        node = node[data.draw(st.sampled_from(inner))]
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    node[data.draw(st.sampled_from(keys))] = data.draw(json_values)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    try:
        found = read_report(path)
    except UsageError as error:
        assert str(path) in str(error)
        return
    compare_reports(as_report(complete()), found, ("a", "b"))
    assert as_report(json.loads(json.dumps(to_json(found)))) == found


def test_a_reason_comes_back_as_the_value_that_is_not_there() -> None:
    content = report(skipped())
    made = as_report(content)
    parity = made.contexts[0].variants[0].parity
    assert parity.cosine == NotMeasured("tensorrt [the library] is not installed")
    assert parity.not_measured == content["contexts"][0]["variants"][0]["parity"]["not_measured"]
    assert to_json(made) == content


def test_a_report_is_written_again_byte_for_byte(tmp_path: Path) -> None:
    content = complete()
    content["model"]["config"] |= {"rope_base": 10000.0, "layers": 4}
    path = write_report(as_report(content), tmp_path)
    text = path.read_bytes()
    assert b'"rope_base": 10000.0' in text and b'"tied": true' in text
    assert write_report(read_report(path), tmp_path).read_bytes() == text

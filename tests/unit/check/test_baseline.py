"""Reports become snapshots, snapshots become files, and other files are refused."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpcompile.check.baseline import (
    SCHEMA,
    UNKNOWN,
    read_baseline,
    require_same_model,
    snapshot_of,
    write_baseline,
)
from cpcompile.core.errors import UsageError
from tests.unit.check.snapshots import snapshot
from tests.unit.report.reports import as_report, report, variant


def test_a_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    write_baseline(snapshot(), file)
    assert read_baseline(file) == snapshot()
    jsonschema.validate(json.loads(file.read_text()), json.loads(SCHEMA.read_text()))


def test_a_report_is_taken_whole(tmp_path: Path) -> None:
    found = snapshot_of(as_report(report(variant("de"), variant("en"))))
    engine = found.places["de", "cpu-fp32"]
    assert found.contexts == ("de", "en") and ("de", "cpu-fp32") in found.engines
    assert {"bytes", "parity_error", "perplexity", "accuracy"} <= engine.values.keys()
    assert engine.verdicts["parity"] == ("pass", None)
    named = {*engine.values, *engine.verdicts, *engine.not_measured}
    for criterion in ("parity", "placement", "memory", "private_memory", "nodes"):
        assert criterion in named, criterion
    assert any(name.startswith("speed_ratio") for name in named)
    write_baseline(found, tmp_path / "base.json")
    assert read_baseline(tmp_path / "base.json").places.keys() == found.places.keys()
    jsonschema.validate(json.loads((tmp_path / "base.json").read_text()), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not a baseline"),
        (b"\xff\xfe", "is not a baseline"),
        (b"[" * 100_000, "is not a baseline"),
        (b"[]", "is not a baseline"),
        (b"{}", r"a value is missing or malformed \('baseline_version'\)"),
        (b'{"baseline_version": 2}', "baseline version 2, this cpcompile reads 1"),
        (b'{"baseline_version": 1}', r"a value is missing or malformed \('model'\)"),
    ],
)
def test_what_is_no_baseline(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "base.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=complaint) as caught:
        read_baseline(file)
    assert str(file) in str(caught.value) and "--update-baseline" in str(caught.value)


def test_a_missing_baseline_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no such baseline; write it with `cpcompile check BUNDLE"):
        read_baseline(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read_baseline(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_baseline_with_anything_in_any_place_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "base.json"
    write_baseline(snapshot(), file)
    plain: Any = json.loads(file.read_text())
    node, keys = plain, list(plain)
    for _ in range(data.draw(st.integers(0, 5))):
        inner = [key for key in keys if isinstance(node[key], dict | list) and node[key]]
        if not inner:
            break
        node = node[data.draw(st.sampled_from(inner))]
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    node[data.draw(st.sampled_from(keys))] = data.draw(json_values)
    file.write_text(json.dumps(plain))
    try:
        read_baseline(file)
    except UsageError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize(
    "edit",
    [
        lambda plain: plain["environment"].update(versions=["torch"]),
        lambda plain: plain["places"].append(plain["places"][-1]),
        lambda plain: plain["places"][-1].update(context="de\n::error::boo"),
        lambda plain: plain["places"][-1].update(variant="\ud800"),
        lambda plain: plain["places"][-1]["verdicts"].update(speed="pass"),
        lambda plain: plain["places"][-1]["values"].update({"memory\x1b[2J": {"value": 1, "low": None, "high": None}}),
        lambda plain: plain["places"][-1]["values"].update(memory={"value": 1, "low": 2, "high": None}),
        lambda plain: plain["places"][-1]["values"].update(memory={"value": 1, "low": None, "high": 0.5}),
    ],
)
def test_a_hostile_baseline_is_refused(edit: Callable[[Any], None], tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    write_baseline(snapshot(), file)
    plain = json.loads(file.read_text())
    edit(plain)
    file.write_text(json.dumps(plain))
    with pytest.raises(UsageError, match="base.json: is not a baseline"):
        read_baseline(file)


def test_what_would_be_waited_for_or_has_no_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "vast").open("wb") as vast:
        vast.truncate(1 << 40)
    for path, reason in (
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "vast", "1,099,511,627,776 bytes"),
    ):
        with pytest.raises(UsageError, match=f"{path}: cannot be read .*{reason}"):
            read_baseline(path)


def test_the_baseline_of_another_model_is_named() -> None:
    path = Path("base.json")
    require_same_model(snapshot(), path, architecture="decoder", contexts=("de", "fr"))
    require_same_model(snapshot(), path, architecture="", contexts=("de",))
    alone = dataclasses.replace(snapshot(), architecture=UNKNOWN)  # written without the model
    require_same_model(alone, path, architecture="decoder", contexts=("de",))
    with pytest.raises(UsageError, match="baseline of another model: model"):
        require_same_model(snapshot(), path, architecture="llama", contexts=("de",))
    with pytest.raises(UsageError, match="the bundle has the contexts fr"):
        require_same_model(snapshot(), path, architecture="", contexts=("fr",))

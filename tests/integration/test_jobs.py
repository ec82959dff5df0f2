"""Contexts compared in several processes: the same results, and the errors of a process as those of one's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cpcompile.bundle.reader import open_bundle
from cpcompile.cli import main
from cpcompile.core.config import ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.pipeline.jobs import compare_in_processes

FAST = ["--no-speed", "--no-memory", "--no-layers"]


def validate(measured: Path, *options: str) -> Result:
    command = ["validate", str(measured / "model.cpc"), "--model", str(measured / "model.pt"), *FAST, *options]
    return CliRunner().invoke(main, command)


def test_jobs_compare_the_same(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = json.loads(validate(measured, "--json").stdout)["contexts"]
    monkeypatch.setattr("cpcompile.validation.validator.compare_engine", None)  # nothing is compared in this process
    two = json.loads(validate(measured, "--json", "--jobs", "2").stdout)["contexts"]
    assert [context["name"] for context in one] == [context["name"] for context in two]
    for (first,), (second,) in ((a["variants"], b["variants"]) for a, b in zip(one, two, strict=True)):
        assert second["parity"]["verdict"] == "pass"
        assert second["parity"]["tolerance"] == pytest.approx(first["parity"]["tolerance"], rel=0.5)
        for name in ("perplexity", "dense_perplexity", "accuracy", "tokens"):
            assert second["quality"][name] == pytest.approx(first["quality"][name], rel=1e-5)


def test_no_jobs_are_no_jobs(measured: Path) -> None:
    result = validate(measured, "--jobs", "0")
    assert result.exit_code == 2 and "validate.jobs is 0: at least 1 is needed" in result.output


def test_what_is_wrong_in_a_process_is_an_error_here(measured: Path, tmp_path: Path) -> None:
    bundle, model = open_bundle(shutil.copytree(measured / "model.cpc", tmp_path / "model.cpc")), measured / "model.pt"

    def compare(data: Path | None = None) -> None:
        compare_in_processes(bundle, model, ValidateConfig(jobs=2), data=data, progress=lambda *_: None)

    with pytest.raises(UsageError, match=r"no-such-corpus"):
        compare(tmp_path / "no-such-corpus")
    for path in bundle.root.rglob("weights.bin"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"weights.bin"):
        compare()
    bundle.root.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"model.cpc: there is no such"):
        compare()


def test_a_process_ends_when_nobody_asks_any_more(tmp_path: Path) -> None:
    arguments = ("cpcompile.pipeline.jobs", str(tmp_path / "x.cpc"), "x.pt", "{}", "1")
    command = [sys.executable, "-P", "-m", "cpcompile.machine.answering", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps(["english", ["cpu-fp32"]]), file=process.stdin, flush=True)
        assert "x.cpc" in json.loads(process.stdout.readline())["error"]
        process.stdin.close()
        assert process.wait(timeout=60) == 0

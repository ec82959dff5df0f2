"""Signals while a command works: nothing unfinished is left, and the message says how to go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import parser

from cpcompile.cli import console, main
from cpcompile.core.types import Progress
from cpcompile.files.onnx_file import load_onnx

Words = list[object]
MATMUL = '<ir_version: 10, opset_import: ["" : 20]> g (float[N,2] x) => (float[N,2] y) { y = Add(x, x) }'


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint and ONNX files; temporary files go there too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("model.pt", "model.dense.pt"):
        shutil.copy(trained.with_name(name), tmp_path)
    for name in ("a.onnx", "b.onnx"):
        onnx.save(parser.parse_model(MATMUL), tmp_path / name)
    return tmp_path


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """interrupt(stage, number): send this process the signal when the stage is at work."""

    def at(stage: str, number: int) -> None:
        def report(name: str, _done: int, _total: int | None) -> None:
            if name.startswith(stage):
                os.kill(os.getpid(), number)

        @contextmanager
        def progress() -> Iterator[Progress]:
            yield report

        monkeypatch.setattr(console, "stage_progress", progress)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    yield at
    signal.signal(signal.SIGINT, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BUILD: Words = ["build", "model.pt", "--no-speed", "--no-memory", "--no-layers", "--contexts", "python"]


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        (BUILD, "load"),
        (BUILD, "export"),
        (BUILD, "validate"),
        (["opt", "a.onnx", "-o", "b.onnx"], "passes"),
        (["compare", "a.onnx", "b.onnx"], "compare"),
        (["check", "a.onnx", "--baseline", "b.onnx"], "compare"),
    ],
)
@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_nothing_is_left_and_nothing_is_changed(
    words: Words,
    stage: str,
    number: int,
    exit_code: int,
    folder: Path,
    interrupt: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    before, handler = contents(folder), signal.getsignal(signal.SIGTERM)
    interrupt(stage, number)
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == exit_code, result.output
    assert f"Interrupted by {signal.Signals(number).name}: unfinished files were removed" in result.output
    assert "run the same command again" in result.output
    assert contents(folder) == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(
    ("stage", "kept"),
    [
        pytest.param("tokens", False, marks=pytest.mark.slow),
        ("importance", True),
        pytest.param("evaluate partition", True, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_training_says_how_to_go_on(
    stage: str,
    kept: bool,
    corpus_folder: Path,
    interrupt: Callable[[str, int], None],
    tmp_path: Path,
) -> None:
    out = tmp_path / "model.pt"
    words = ["train", "--data", corpus_folder, "--cache", tmp_path / "cache", "-o", out, "--preset", "nano"]
    words += ["--steps", 2, "--sequence", 16, "--batch", 1]
    interrupt(stage, signal.SIGTERM)
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 143, result.output
    assert ("resume with the same command and --resume" in result.output) == kept
    assert ("run the same command again" in result.output) != kept
    assert (tmp_path / "model.pt.work").exists() == kept
    assert not list(tmp_path.rglob(".*"))
    resume = ["--resume"] if kept else []
    interrupt("no such stage", signal.SIGTERM)
    again = CliRunner().invoke(main, [str(word) for word in (*words, *resume)])
    assert again.exit_code == 0, again.output


@pytest.mark.slow
def test_a_real_process_ends_with_143(folder: Path) -> None:
    command = [sys.executable, "-m", "cpcompile", *map(str, BUILD)]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(folder.glob(".model.cpc.building-*")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate()
    assert process.returncode == 143, message
    assert "Interrupted by SIGTERM" in message and "Traceback" not in message
    assert not list(folder.glob(".*"))


def test_what_was_killed_before_goes_even_if_the_next_output_is_another(folder: Path) -> None:
    left = folder / ".model.cpc.building-1-00000000"
    (left / "weights").mkdir(parents=True)
    result = CliRunner().invoke(main, ["opt", str(folder / "a.onnx"), "-o", str(folder / "c.onnx")])
    assert result.exit_code == 0, result.output
    assert not left.exists()
    assert np.isclose(len(load_onnx(folder / "c.onnx").graph), 1)

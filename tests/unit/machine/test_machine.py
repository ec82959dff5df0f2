from __future__ import annotations

import importlib.metadata
import mmap
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import cpcompile
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.measured import NotMeasured
from cpcompile.machine.environment import available_cores, environment
from cpcompile.machine.gpu import NO_GPU, video_memory
from cpcompile.machine.memory import PrivatePeak, peak_resident_bytes, private_bytes, reset_peak, resident_bytes
from cpcompile.machine.subprocesses import fresh_processes, in_fresh_process

MIB = 2**20
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="the peak can only be reset where there is /proc")

LOADS_96_RUNS_32 = """
import dataclasses, json
from cpcompile.core.json_form import to_json
from cpcompile.machine.memory import measure_memory

def touched(mebibytes):
    return bytearray(b"x") * (mebibytes * 2**20)

def load():
    touched(96)
    return touched(8)

print("not the result")
print(json.dumps(to_json(measure_memory(load, lambda loaded: touched(32)))))
"""


@needs_proc
def test_a_fresh_process_measures_what_it_allocates() -> None:
    memory = in_fresh_process("-c", LOADS_96_RUNS_32)
    base = memory["base_rss_bytes"]
    # Linux counts resident pages per thread and sums up in batches: a few pages more or less.
    assert 95 * MIB < memory["load_peak_rss_bytes"] - base < 104 * MIB
    assert 39 * MIB < memory["run_peak_rss_bytes"] - base < 48 * MIB


MAPS_OR_ALLOCATES = """
import dataclasses, json, mmap, sys
from cpcompile.core.json_form import to_json
from cpcompile.machine.memory import measure_memory

def mapped(path):
    with open(path, "rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(whole[::4096])
    return whole

def read(path):
    with open(path, "rb") as file:
        return file.read()

load = {"maps": mapped, "allocates": read}[sys.argv[1]]
print(json.dumps(to_json(measure_memory(lambda: load(sys.argv[2]), len))))
"""


@needs_proc
def test_a_mapped_file_is_resident_and_not_private(tmp_path: Path) -> None:
    """Both processes have its 64 MiB in memory; only that which read it holds them."""
    (tmp_path / "weights").write_bytes(bytes(range(256)) * (64 * MIB // 256))
    grown = {}
    for how in ("maps", "allocates"):
        memory = in_fresh_process("-c", MAPS_OR_ALLOCATES, how, str(tmp_path / "weights"))
        resident = memory["load_peak_rss_bytes"] - memory["base_rss_bytes"]
        private = [memory[f"{when}_peak_private_bytes"] - memory["base_private_bytes"] for when in ("load", "run")]
        grown[how] = (resident, *private)
    for when in (0, 1, 2):
        assert 63 * MIB < grown["allocates"][when] < 72 * MIB
    assert 63 * MIB < grown["maps"][0] < 72 * MIB
    assert all(private < 4 * MIB for private in grown["maps"][1:])


@needs_proc
def test_samples_see_what_is_freed_again() -> None:
    before = private_bytes()
    with PrivatePeak() as private, mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        np.frombuffer(block, dtype=np.uint8)[:] = 1
        time.sleep(0.1)
    assert before is not None and private.bytes is not None
    assert private.bytes - before >= 60 * MIB


def test_without_a_gpu_the_reason_says_so() -> None:
    if environment().gpu is None:
        assert video_memory() == NotMeasured(NO_GPU)
    else:
        assert video_memory()


@needs_proc
def test_a_child_does_not_report_its_parents_peak() -> None:
    held = np.ones(256 * MIB, dtype=np.uint8)
    child = (
        "import json; from cpcompile.machine.memory import peak_resident_bytes; "
        "print(json.dumps(peak_resident_bytes()))"
    )
    assert in_fresh_process("-c", child) < 128 * MIB < held.nbytes < peak_resident_bytes()


@needs_proc
def test_the_peak_stays_until_it_is_reset() -> None:
    assert reset_peak()
    before = resident_bytes()
    # Pages of its own: the allocator of a process that has freed a lot would keep them.
    with mmap.mmap(-1, 64 * MIB) as block:
        np.frombuffer(block, dtype=np.uint8)[:] = 1
        assert resident_bytes() - before >= 60 * MIB
    assert peak_resident_bytes() - before >= 60 * MIB
    assert reset_peak()
    assert peak_resident_bytes() - before < 32 * MIB


def test_a_failing_process_says_why() -> None:
    with pytest.raises(CpcompileError, match="ValueError: the reason"):
        in_fresh_process("-c", "raise ValueError('the reason')")
    with pytest.raises(CpcompileError, match="exit code 7"):
        in_fresh_process("-c", "raise SystemExit(7)")


ANSWERS = """
import os, sys
from cpcompile.core.errors import UsageError
def answer(question, word):
    if question == "end":
        print("first", "last", sep="\\n", file=sys.stderr)
        sys.exit(3)
    if question == "kill":
        os.kill(os.getpid(), 9)
    if question == "refuse":
        raise UsageError("refused")
    print("not an answer")
    return [os.getpid(), question, word]
"""


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that answers."""
    (tmp_path / "answers_of_a_test.py").write_text(ANSWERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "answers_of_a_test"


def test_processes_answer_any_thread_and_do_not_outlive_the_block(answering: str) -> None:
    with fresh_processes(2, answering, "word") as ask, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, "abcdef"))
    assert [(question, word) for _, question, word in answers] == [(each, "word") for each in "abcdef"]
    processes = {pid for pid, _, _ in answers}
    assert 1 <= len(processes) <= 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


@pytest.mark.parametrize(("question", "says"), [("end", "a process failed: last$"), ("kill", "killed by signal 9$")])
def test_a_process_that_ends_instead_of_answering_is_an_error(answering: str, question: str, says: str) -> None:
    with fresh_processes(1, answering, "word") as ask:
        for _ in range(2):
            with pytest.raises(CpcompileError, match=says):
                ask(question)


def test_what_a_process_refuses_is_refused_and_it_goes_on(answering: str) -> None:
    with fresh_processes(1, answering, "word") as ask:
        with pytest.raises(UsageError, match="^refused$"):
            ask("refuse")
        assert ask("again")[1:] == ["again", "word"]


def test_a_file_in_the_working_folder_is_not_taken_for_a_library(tmp_path, monkeypatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert in_fresh_process("-c", "import numpy; print(numpy.arange(3).sum())") == 3


def test_measuring_and_reporting_do_without_torch() -> None:
    code = (
        "import json, sys, cpcompile.report, cpcompile.machine.environment as m; "
        "m.environment(); print(json.dumps([*sys.modules]))"
    )
    modules = in_fresh_process("-c", code)
    assert "cpcompile.report" in modules
    assert not {"torch", "onnx", "onnxruntime", "matplotlib", "jinja2", "jsonschema"} & set(modules)


def test_environment_states_this_machine() -> None:
    facts = environment()
    assert facts.cpu and facts.cores == available_cores() >= 1
    versions = facts.versions
    assert versions["cpcompile"] == cpcompile.__version__
    assert versions["torch"] == torch.__version__
    assert versions["numpy"] == np.__version__
    assert versions["onnxruntime"] is not None


def test_the_runtimes_of_added_engines_are_named_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"openvino": "2026.1", "tensorrt-rtx": "1.7"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = environment().versions
    assert (versions["openvino"], versions["tensorrt_rtx"], versions["torch"]) == ("2026.1", "1.7", None)
    assert "tensorrt" not in versions

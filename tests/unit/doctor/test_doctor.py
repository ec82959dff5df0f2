"""The doctor, as a command in a process of its own: here, and where packages are broken in every way."""

import gc
import json
import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import onnx
import pytest

from cpcompile.core.extras import BUILD, RUNTIME
from cpcompile.core.measured import NotMeasured
from cpcompile.doctor import look
from cpcompile.doctor.examination import TARGETS, examine
from cpcompile.doctor.trials import TWO_NODES, run_trial
from cpcompile.machine.gpu import gpu_model

ROOT = Path(__file__).parents[3]


def doctor(planted: Path | None = None, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`planted` comes first on the import path, as a broken package would."""
    folders = [*([str(planted)] if planted else []), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-P", "-m", "cpcompile", "doctor", *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)} | environment,
    )


def examination(planted: Path | None = None, **environment: str) -> tuple[dict[str, Any], int]:
    done = doctor(planted, "--json", **environment)
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout), done.returncode


def finding(found: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = (each for each in found["findings"] if each["name"] == name)
    return one


def target(found: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = (each for each in found["targets"] if each["name"] == name)
    return one


def plant(folder: Path, module: str, source: str, *, distribution: str | None = None, metadata: str = "") -> None:
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(source, encoding="utf-8")
    if distribution is not None:
        info = folder / f"{distribution.replace('-', '_')}-9.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata, encoding="utf-8")


def metadata(name: str) -> str:
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n"


def test_the_two_nodes_are_a_model() -> None:
    model = onnx.load_model_from_string(TWO_NODES)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Mul", "Add"]


def test_this_installation_is_healthy_and_its_json_has_these_keys() -> None:
    """Scripts read them: a change of keys is a change of schema_version."""
    found, code = examination()
    assert code == 0 and found["healthy"] and found["schema_version"] == 1
    assert set(found) == {"schema_version", "healthy", "findings", "targets", "gpus"}
    assert all(set(each) == {"name", "state", "version", "detail", "fix"} for each in found["findings"])
    assert all(set(each) == {"name", "status", "needs", "missing", "reason", "fix"} for each in found["targets"])
    assert {each["state"] for each in found["findings"]} <= {"ok", "absent", "broken"}
    assert [each["name"] for each in found["targets"]] == [each.name for each in TARGETS]
    assert {need for each in found["targets"] for need in each["needs"]} <= {each["name"] for each in found["findings"]}
    assert target(found, "cpu-fp32") | {"needs": []} == {
        "name": "cpu-fp32",
        "status": "works",
        "needs": [],
        "missing": [],
        "reason": "",
        "fix": [],
    }
    assert finding(found, "onnxruntime")["version"]


def test_the_table_says_what_works_and_its_limitations() -> None:
    done = doctor()
    assert done.returncode == 0 and not done.stderr
    for each in TARGETS:
        assert each.name in done.stdout
    assert "works" in done.stdout and "limitation" in done.stdout


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('a library is too old')", "RuntimeError: a library is too old"),
        ("import libcuda_that_is_not_there", "No module named 'libcuda_that_is_not_there'"),
        ("import os; os.kill(os.getpid(), 11)", "crashed (SIGSEGV)"),
        ("import os; os._exit(0)", "ended without an answer"),
        ("raise SystemExit(0)", "ended without an answer"),
        ("x = = 1", "SyntaxError"),
        ("", "has no attribute"),
    ],
)
def test_an_onnxruntime_that_breaks_on_import_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    plant(tmp_path, "onnxruntime", source)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    result = run_trial("onnxruntime")
    assert isinstance(result, NotMeasured) and said in result.reason


def test_without_onnxruntime_the_cpu_target_only_builds(tmp_path: Path) -> None:
    plant(tmp_path, "onnxruntime", "raise RuntimeError('a library is too old')")
    found, code = examination(tmp_path)
    broken = finding(found, "onnxruntime")
    assert code == 1 and not found["healthy"]
    assert broken["state"] == "broken" and "a library is too old" in broken["detail"] and broken["fix"]
    assert target(found, "cpu-fp32")["status"] == "builds"
    assert target(found, "cpu-fp32")["fix"] == broken["fix"]


def test_two_wheels_of_onnxruntime_are_named_with_what_fixes_them(tmp_path: Path) -> None:
    plant(tmp_path, "nothing", "", distribution="onnxruntime-gpu", metadata=metadata("onnxruntime-gpu"))
    found, _ = examination(tmp_path)
    broken = finding(found, "onnxruntime")
    assert broken["state"] == "broken"
    assert "onnxruntime and onnxruntime-gpu are installed; they hold the same module" in broken["detail"]
    assert broken["fix"][0] == "pip uninstall -y onnxruntime onnxruntime-gpu"


def test_a_package_without_its_module_or_its_version_is_half_installed(tmp_path: Path) -> None:
    plant(tmp_path, "nothing", "", distribution="tensorrt", metadata=metadata("tensorrt"))
    plant(tmp_path, "gguf", "", distribution="gguf", metadata="")
    found, code = examination(tmp_path)
    half = finding(found, "tensorrt")
    assert half["state"] == "broken" and "half installed: there is no module tensorrt" in half["detail"]
    assert half["fix"] == ["pip install --force-reinstall --no-deps tensorrt"]
    assert finding(found, "gguf")["state"] == "broken" and "no version" in finding(found, "gguf")["detail"]
    assert code == 0  # neither is needed on the CPU


def test_metadata_that_is_no_text_is_a_finding(tmp_path: Path) -> None:
    plant(tmp_path, "tensorrt", "", distribution="tensorrt")
    (tmp_path / "tensorrt-9.0.dist-info" / "METADATA").write_bytes(b"Name: tensorrt\nVersion: \xff\xfe\n")
    found, code = examination(tmp_path)
    assert finding(found, "tensorrt")["state"] == "broken" and code == 0


def test_a_builder_library_that_is_missing_is_a_finding(tmp_path: Path) -> None:
    """PyPI has only the bindings of tensorrt, without libnvinfer."""
    source = "raise ImportError('libnvinfer.so.11: cannot open shared object file: No such file or directory')"
    plant(tmp_path, "tensorrt", source, distribution="tensorrt", metadata=metadata("tensorrt"))
    found, _ = examination(tmp_path)
    broken = finding(found, "tensorrt")
    assert (broken["state"], broken["version"]) == ("broken", "9.0")
    assert "libnvinfer.so.11: cannot open shared object file" in broken["detail"]
    assert "tensorrt" in target(found, "tensorrt")["missing"] and target(found, "tensorrt")["status"] == "no"


def test_openvino_that_breaks_leaves_its_targets_to_be_built(tmp_path: Path) -> None:
    plant(tmp_path, "openvino", "raise RuntimeError('a library is too old')")
    found, code = examination(tmp_path)
    assert code == 0  # the CPU does not need it
    assert "a library is too old" in finding(found, "openvino")["detail"]
    assert finding(found, "bfloat16")["detail"] == "OpenVINO, which would know, does not work"
    for name in ("openvino-fp32", "openvino-bf16"):
        assert target(found, name)["status"] == "builds" and target(found, name)["fix"]


def test_a_torch_without_its_files_is_a_finding(tmp_path: Path) -> None:
    plant(tmp_path, "torch", "raise OSError('libtorch_cpu.so')")
    found, code = examination(tmp_path)
    assert code == 1
    assert finding(found, "torch")["state"] == "broken" and "version.py" in finding(found, "torch")["detail"]
    assert target(found, "cpu-fp32")["status"] == "runs"


@pytest.mark.parametrize(("written", "said"), [("'13.0'", "CUDA 13.0"), ("None", "without CUDA")])
def test_the_cuda_of_torch_is_read_without_importing_it(tmp_path: Path, written: str, said: str) -> None:
    plant(tmp_path, "torch", "raise OSError('imported')")
    lines = f"from typing import Optional\n__version__ = '2.13.0'\ncuda: Optional[str] = {written}\n"
    (tmp_path / "torch" / "version.py").write_text(lines, encoding="utf-8")
    found, _ = examination(tmp_path)
    assert finding(found, "torch")["detail"] == said
    assert finding(found, "torch-cuda")["state"] == ("broken" if said == "CUDA 13.0" else "absent")


def test_the_cuda_of_torch_is_read_by_many_threads_at_once() -> None:
    """While one thread collects garbage, and calls back, others go on."""

    def called_back(*_: object) -> None:
        sum(range(100))

    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(called_back)
    gc.set_threshold(20)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = set(pool.map(lambda _: look.torch(), range(200)))
    finally:
        gc.callbacks.remove(called_back)
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)
    assert {each.state for each in found} == {"ok"}


def test_nvml_without_a_driver_and_a_broken_nvml_are_findings(tmp_path: Path) -> None:
    plant(tmp_path, "pynvml", "raise OSError('libnvidia-ml.so.1: cannot open shared object file')")
    found, code = examination(tmp_path)
    gpu = finding(found, "nvidia-gpu")
    assert code == 0 and not found["gpus"]
    assert gpu["detail"] == "no NVIDIA GPU" or "libnvidia-ml.so.1" in gpu["detail"]


def test_a_plugin_provider_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    plant(tmp_path, "onnxruntime_ep_nv_tensorrt_rtx", "def get_library_path():\n    return '/nowhere/librtx.so'\n")
    found, _ = examination(tmp_path)
    provider = finding(found, "NvTensorRTRTXExecutionProvider")
    assert provider["state"] == "absent" and "/nowhere/librtx.so" in provider["detail"]


def test_a_trial_that_hangs_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "tensorrt", "import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    assert run_trial("tensorrt", "tensorrt", seconds=1) == NotMeasured("gave no answer within 1 s")


def test_programs_that_are_missing_or_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look.program("cmake", package="cmake").state == "absent"
    for source, state, version in (("echo cmake version 3.25.1", "ok", "3.25.1"), ("exit 3", "broken", None)):
        (tmp_path / "cmake").write_text(f"#!/bin/sh\n{source}\n", encoding="ascii")
        (tmp_path / "cmake").chmod(0o755)
        found = look.program("cmake", package="cmake")
        assert (found.state, found.version) == (state, version)


def test_headers_are_found_where_cpath_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / look.HEADER).touch()
    (tmp_path / "onnxruntime" / "onnxruntime_c_api.h").write_text("#define ORT_API_VERSION 32\n", encoding="ascii")
    monkeypatch.setenv("CPATH", str(tmp_path))
    assert look.onnxruntime_headers().version == "1.32"


def plant_card(bus: Path) -> None:
    """A graphics card with its sound."""
    for address, kind in (("0000:01:00.0", "0x030000"), ("0000:01:00.1", "0x040300")):
        (bus / address).mkdir()
        (bus / address / "vendor").write_text("0x10de\n", encoding="ascii")
        (bus / address / "class").write_text(f"{kind}\n", encoding="ascii")


@pytest.mark.skipif(gpu_model() is not None, reason="there is a GPU here")
def test_a_card_without_a_driver_brings_the_commands_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card no command helps, and none is shown."""
    monkeypatch.setattr(look, "PCI", tmp_path / "nothing")
    without = {each.name: each for each in examine().targets}
    plant_card(tmp_path)
    monkeypatch.setattr(look, "PCI", tmp_path)
    assert look.nvidia_cards() == ["0000:01:00.0"]
    found = examine()
    states = {each.name: each for each in found.findings}
    assert states["nvidia-driver"].state == states["nvidia-gpu"].state == "broken"
    assert states["nvidia-driver"].fix and states["CUDAExecutionProvider"].fix
    for each in found.targets:
        if each.name in ("cuda-fp16", "tensorrt", "tensorrt-rtx"):
            assert each.status != "works" and each.fix, each
            assert "no NVIDIA GPU" in without[each.name].reason, each
    assert not without["cuda-fp16"].fix and not without["tensorrt"].fix


def test_the_dependencies_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for declared, known in ((project["dependencies"], RUNTIME), (project["optional-dependencies"]["build"], BUILD)):
        assert tuple(re.split("[<>=!~]", each)[0] for each in declared) == known


def test_with_click_alone_the_doctor_says_what_is_missing_and_so_does_every_command(tmp_path: Path) -> None:
    """As after `pip install --no-deps`: the tables need rich, and almost everything else needs numpy and torch."""
    for folder in Path(click.__file__).parents[1].glob("click*"):
        (tmp_path / folder.name).symlink_to(folder)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", "-P", "-m", "cpcompile", *arguments]  # -S: without site-packages
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    done = run("doctor")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"^rich +absent +- not installed$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^click +ok ", done.stdout, re.MULTILINE) and "  pip install cpcompile\n" in done.stdout
    assert re.search(r"^cpu-fp32 +no +numpy, rich, tokenizers, torch, .*: not installed; ", done.stdout, re.MULTILINE)
    assert "  pip install 'cpcompile[build]'\n" in done.stdout
    done = run("passes")
    assert done.returncode == 2
    assert re.fullmatch(r"Error: `cpcompile passes` needs \w+: pip install 'cpcompile\[build\]'\n", done.stderr)
    done = run("inspect", "model.cpc")
    assert done.returncode == 1
    assert re.fullmatch(r"Error: No module named '\w+'; `cpcompile doctor` says .* how to install it\n", done.stderr)

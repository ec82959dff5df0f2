"""An installation that only runs engines: `pip install '.[cpu]'`, without torch and the rest of the extra `build`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from packaging.requirements import Requirement

from cpcompile.cli import main
from cpcompile.core.extras import BUILD, RUNTIME
from cpcompile.runtime.engine import Engine, load_engine, session_options

ROOT = Path(__file__).parents[2]
WORK = ("doctor", "export", "inspect", "run")
"""Commands that need nothing of the extra `build`."""
OTHERS = {
    "train": "--data {folder} --out {folder}/new.pt",
    "calibrate": "{folder}/model.pt --data {folder}",
    "build": "{folder}/model.pt -o {folder}/new.cpc",
    "estimate": "{folder}/model.pt",
    "validate": "{folder}/model.cpc",
    "report": "{folder}/model.cpc",
    "check": "{folder}/model.cpc --baseline {folder}/model.cpc/report.json",
    "opt": "{folder}/model.cpc/cpp/cpu-fp32/model.onnx -o {folder}/new.onnx",
    "compare": "{folder}/a.onnx {folder}/b.onnx",
    "passes": "",
    "demo": "--out {folder}/new",
}
IDS = np.arange(34, dtype=np.int64).reshape(2, 17) * 11 % 500
Run = subprocess.CompletedProcess[str]


def link(folder: Path, *names: str) -> None:
    """Put links to the distributions `names`, and to all that they need, into `folder`."""
    linked, waiting = set[str](), set(names)
    while waiting:
        linked.add(name := waiting.pop())
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
        needed = map(Requirement, distribution.requires or [])
        waiting |= {each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})} - linked


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of such an installation, without cpcompile."""
    folder = tmp_path_factory.mktemp("packages")
    link(folder, *RUNTIME, "onnxruntime")
    return folder


def python(packages: Path, *arguments: object, folder: Path | None = None) -> Run:
    """Python with these packages and the sources of cpcompile; -S leaves out the site-packages of this environment."""
    return subprocess.run(
        [sys.executable, "-S", "-P", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(packages), str(ROOT)))},
    )


def cpcompile(packages: Path, *arguments: object) -> Run:
    return python(packages, "-m", "cpcompile", *arguments)


def test_there_is_nothing_that_builds(packages: Path) -> None:
    names = [name.replace("-", "_") for name in BUILD]
    code = "import sys, importlib.util as u; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    assert python(packages, "-c", code, *names).stdout == "[]\n"


def test_the_version_and_the_help_of_every_command(packages: Path) -> None:
    assert cpcompile(packages, "--version").stdout.startswith("cpcompile, version ")
    code = (
        "import sys; from cpcompile.cli import main; [main([c, '--help'], standalone_mode=False) for c in sys.argv[1:]]"
    )
    done = python(packages, "-c", code, *main.commands)
    assert done.returncode == 0 and not done.stderr and done.stdout.count("Usage: ") == len(main.commands)


@pytest.mark.parametrize("command", [name for name in main.commands if name not in WORK])
def test_other_commands_say_which_extra_they_need(packages: Path, measured: Path, command: str) -> None:
    done = cpcompile(packages, command, *OTHERS[command].format(folder=measured).split())
    assert done.returncode == 2 and not done.stdout
    said = re.fullmatch(rf"Error: `cpcompile {command}` needs (\w+): pip install 'cpcompile\[build\]'\n", done.stderr)
    assert said is not None and said[1].replace("_", "-") in BUILD, done.stderr
    assert not list(measured.glob("new*"))


def test_debug_shows_where_a_package_is_missing(packages: Path) -> None:
    done = cpcompile(packages, "--debug", "passes")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("name", ["partition", "select_units", "save_program"])
def test_functions_say_which_extra_they_need(packages: Path, name: str) -> None:
    done = python(packages, "-c", f"import cpcompile; cpcompile.__version__; from cpcompile import {name}")
    last = done.stderr.splitlines()[-1]
    said = rf"ModuleNotFoundError: cpcompile\.{name} needs \w+: pip install 'cpcompile\[build\]'"
    assert done.returncode == 1 and re.fullmatch(said, last), done.stderr


def test_the_doctor_is_content(packages: Path) -> None:
    done = cpcompile(packages, "doctor")
    assert done.returncode == 0 and "pip install 'cpcompile[build]'" in done.stdout, done.stdout
    found = json.loads(cpcompile(packages, "doctor", "--json").stdout)
    (target,) = (each for each in found["targets"] if each["name"] == "cpu-fp32")
    assert found["healthy"] and target["status"] == "runs"
    assert target["missing"] == list(BUILD) and target["fix"] == ["pip install 'cpcompile[build]'"]
    assert target["reason"] == f"{', '.join(BUILD)}: not installed"


def test_the_doctor_is_not_content_if_what_builds_is_broken(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    done = cpcompile(Path(f"{tmp_path}{os.pathsep}{packages}"), "doctor", "--json")
    assert done.returncode == 1 and not json.loads(done.stdout)["healthy"]


def test_inspect_shows_how_to_load_an_engine(packages: Path, measured: Path) -> None:
    done = cpcompile(packages, "inspect", measured / "model.cpc", "--verify")
    assert done.returncode == 0 and "cpu-fp32" in done.stdout and not done.stderr, done.stderr
    found = json.loads(cpcompile(packages, "inspect", measured / "model.cpc", "--json").stdout)
    assert [each["runs_here"] for each in found["engines"]] == [True] * 3
    done = python(packages, "-c", f"{found['loading']['python']}\nprint(engine([[1, 2, 3]]).shape)")
    assert done.stdout == f"(1, 3, {found['contexts'][0]['vocabulary']['tokens']})\n", done.stderr


def test_an_exported_engine_computes_the_same(packages: Path, measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "english.onnx"
    done = cpcompile(packages, "export", measured / "model.cpc", "english", "-o", out)
    assert done.returncode == 0, done.stderr
    onnx.checker.check_model(out, full_check=True)
    engine = load_engine(measured / "model.cpc", "english", threads=1)
    session = ort.InferenceSession(out, session_options(engine.variant, threads=1), providers=["CPUExecutionProvider"])
    assert np.array_equal(Engine(engine.variant, session).run(IDS), engine.run(IDS))


def test_the_command_that_inspect_shows_writes_text(packages: Path, measured: Path) -> None:
    command = json.loads(cpcompile(packages, "inspect", measured / "model.cpc", "--json").stdout)["loading"]["command"]
    program, *words = shlex.split(command)
    done = cpcompile(packages, *words, "-n", "8")
    assert program == "cpcompile" and done.returncode == 0 and len(done.stdout) > 1 and not done.stderr, done.stderr


def test_the_snippet_of_the_readme_writes_text(packages: Path, measured: Path) -> None:
    done = python(packages, "-c", snippet_of_the_readme(), folder=measured)
    assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr


def snippet_of_the_readme() -> str:
    (snippet,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return str(snippet)


def test_the_plugin_of_pytest_is_loaded(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an entry point, it is in every run of pytest; here it is named, whether or not the sources are installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    link(tmp_path, "pytest")
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    plugin = ("-p", "cpcompile.check.pytest_plugin", "-p", "no:cacheprovider")
    done = python(Path(f"{tmp_path}{os.pathsep}{packages}"), "-m", "pytest", *plugin, tmp_path / "test_one.py")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr

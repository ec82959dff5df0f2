"""The wheel holds every module: built, installed without dependencies in an empty environment, sources compared.

With the extra `cpu` and what it needs, it runs engines: `test_without_torch` checks the same in less time, without pip.
"""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import onnx
import pytest

from cpcompile.core.extras import BUILD

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
FOLDERS = {
    "cpcompile": ROOT / "cpcompile",
    "cpcompile/bundle": ROOT / "cpcompile/bundle",
    "cpcompile/check": ROOT / "cpcompile/check",
    "cpcompile/check/formats": ROOT / "cpcompile/check/formats",
    "cpcompile/cli": ROOT / "cpcompile/cli",
    "cpcompile/core": ROOT / "cpcompile/core",
    "cpcompile/doctor": ROOT / "cpcompile/doctor",
    "cpcompile/exporters": ROOT / "exporters",
    "cpcompile/files": ROOT / "cpcompile/files",
    "cpcompile/frontend": ROOT / "cpcompile/frontend",
    "cpcompile/machine": ROOT / "cpcompile/machine",
    "cpcompile/models": ROOT / "models",
    "cpcompile/partitioning": ROOT / "cpcompile/partitioning",
    "cpcompile/partitioning/rules": ROOT / "cpcompile/partitioning/rules",
    "cpcompile/passes": ROOT / "passes",
    "cpcompile/passes/channel_rules": ROOT / "passes/channel_rules",
    "cpcompile/pipeline": ROOT / "cpcompile/pipeline",
    "cpcompile/pipeline/estimation": ROOT / "cpcompile/pipeline/estimation",
    "cpcompile/report": ROOT / "cpcompile/report",
    "cpcompile/runtime": ROOT / "cpcompile/runtime",
    "cpcompile/targets": ROOT / "cpcompile/targets",
    "cpcompile/text": ROOT / "cpcompile/text",
    "cpcompile/training": ROOT / "cpcompile/training",
    "cpcompile/validation": ROOT / "cpcompile/validation",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(run, check=True, capture_output=True, text=True)
    (found,) = folder.glob("*.whl")
    return found


def install(environment: Path, *arguments: str) -> Path:
    """The site-packages of a new environment in which pip has installed `arguments`."""
    venv.create(environment, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", *arguments]
    done = subprocess.run(pip, check=False, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    (site,) = (environment / "lib").glob("python*/site-packages")
    return site


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The site-packages of an empty environment with only our wheel."""
    return install(wheel.with_name("alone"), "--no-deps", "--no-index", str(wheel))


@pytest.mark.parametrize("package", FOLDERS)
def test_wheel_holds_every_source(installed: Path, package: str) -> None:
    expected = {p.name: p.read_bytes() for p in FOLDERS[package].glob("*.py")}
    found = {p.name: p.read_bytes() for p in (installed / package).glob("*.py")}
    assert expected, f"no sources in {FOLDERS[package]}"
    assert found == expected


def test_wheel_holds_schema_templates_and_licence(installed: Path) -> None:
    assert (installed / "cpcompile/report/report.schema.json").is_file()
    templates = {p.name for p in (ROOT / "cpcompile/report/templates").iterdir()}
    assert {p.name for p in (installed / "cpcompile/report/templates").iterdir()} == templates
    assert (installed / "cpcompile/py.typed").is_file()
    (information,) = installed.glob("cpcompile-*.dist-info")
    assert "License-Expression: Apache-2.0" in (information / "METADATA").read_text()
    assert (information / "licenses/LICENSE").is_file()


def test_every_folder_with_sources_is_listed() -> None:
    packages = {
        source.parent.resolve()
        for folder in ("cpcompile", "passes", "exporters", "models")
        for source in (ROOT / folder).glob("**/*.py")
    }
    assert packages == {folder.resolve() for folder in FOLDERS.values()}


@pytest.fixture(scope="module")
def runtime(wheel: Path) -> Path:
    """The site-packages of a new environment with the wheel, the extra `cpu` and what they need, from pip's index."""
    return install(wheel.with_name("runtime"), f"{wheel}[cpu]", "-c", str(ROOT / "constraints.txt"))


@pytest.mark.slow
def test_what_runs_engines_is_small(runtime: Path) -> None:
    assert not [name for name in BUILD if (runtime / name.replace("-", "_")).exists()]
    size = sum(path.stat().st_blocks * 512 for path in runtime.rglob("*") if not path.is_symlink())
    assert size < 250 << 20, f"{size >> 20} MB"


@pytest.mark.slow
def test_what_runs_engines_inspects_exports_and_writes_text(runtime: Path, measured: Path, tmp_path: Path) -> None:
    def run(program: str, *arguments: object) -> str:
        words = [runtime.parents[2] / "bin" / program, *arguments]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=measured, env=ENVIRONMENT)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout

    assert re.search(r"cpu-fp32 +runs ", run("cpcompile", "doctor"))
    assert "cpu-fp32" in run("cpcompile", "inspect", "model.cpc", "--verify")
    run("cpcompile", "export", "model.cpc", "english", "-o", tmp_path / "english.onnx")
    onnx.checker.check_model(tmp_path / "english.onnx", full_check=True)
    (snippet,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert run("python", "-P", "-c", snippet)

"""The wheel holds every module: built, installed without dependencies in an empty environment, sources compared."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of an empty environment with only our wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    run = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(run, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    (site,) = (environment / "lib").glob("python*/site-packages")
    return site


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

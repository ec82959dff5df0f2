"""The worked example of CONTRIBUTING does what it says, and what `make lint` runs also runs before a commit."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COPIED = ("cpcompile", "passes", "exporters", "models", "tests", "docs", "pyproject.toml", "README.md", "LICENSE")
BIN = Path(sys.executable).parent


def run(words: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository after a newcomer has typed in the example."""
    folder = tmp_path_factory.mktemp("clone")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name, follow_symlinks=False)
    for language, title, text in FENCE.findall(CONTRIBUTING):
        if language == "python":
            assert not (folder / title).exists(), f"{title} is there: choose another example"
            (folder / title).write_text(text, encoding="utf-8")
        elif language == "diff":
            lines = text.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if not line.startswith("+")).strip("\n")
            content = (folder / title).read_text(encoding="utf-8")
            assert content.count(before) == 1, f"{title}: {before}"
            after = "".join(line[1:] for line in lines).strip("\n")
            (folder / title).write_text(content.replace(before, after), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_example_passes_its_test_and_the_linters(clone: Path) -> None:
    ran = []
    for language, _, text in FENCE.findall(CONTRIBUTING):
        for line in text.splitlines() if language == "sh" else ():
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                run([*words, "--dry-run"], ROOT)
                continue
            name = words[0].removeprefix(".venv/bin/")
            assert name in ("python", "cpcompile", "ruff", "mypy", "lint-imports"), line
            program = {"cpcompile": [sys.executable, "-m", "cpcompile"], "python": [sys.executable]}.get(
                name, [str(BIN / name)]
            )
            if name == "mypy":  # what `make lint` has checked already is not checked again
                words += ["--cache-dir", str(ROOT / ".mypy_cache")]
            output = run([*program, *words[1:]], clone)
            ran.append(name)
            if name == "cpcompile":
                assert re.search("^skip_repeated_operators +Let an operator read", output, re.MULTILINE)
    assert {"python", "cpcompile", "ruff", "mypy", "lint-imports"} == set(ran)


def test_the_floors_in_the_text_are_those_of_import_linter() -> None:
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"^layers = \[\n(.*?)^\]", contract, re.MULTILINE | re.DOTALL)
    assert layers is not None
    enforced = [set(re.findall(r"cpcompile\.(\w+)", line)) for line in layers[1].splitlines()]
    rows = re.findall(r"^\| \d \| (.*?) \|", CONTRIBUTING, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == enforced


def test_pre_commit_runs_what_make_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe is not None
    linted = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    assert [hook["entry"] for hook in hooks] == linted


def test_issue_templates_have_what_a_form_needs() -> None:
    forms = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
    assert [path.stem for path in forms] == ["bug", "feature", "wrong-result"]
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys()
        assert len({field["id"] for field in form["body"]}) == len(form["body"])

"""`pytest --cpcompile model.cpc --cpcompile-baseline base.json`: every engine and criterion of a check is a test.

    model.cpc::english::cpu-fp32::perplexity

Tests are collected from the baseline alone. The first that runs starts `cpcompile check` in a process of its own, and
all others read its result: there is one measurement per run, even if pytest-xdist runs tests in several processes,
which share a folder and its lock. inconclusive and not measured become skipped tests with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OPTIONS = ("baseline", "model", "data", "config")
FOLDER = "cpcompile_folder"
FILE_TESTS = ("parity", "nodes", "parameters", "bytes", "speed_ratio")
"""Tests of an ONNX file, which has no baseline to collect them from."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flags of `cpcompile check`, under names that conflict with no other plugin."""
    group = parser.getgroup("cpcompile", "check a bundle against its baseline")
    group.addoption("--cpcompile", metavar="BUNDLE", type=Path, help="Bundle or ONNX file to check.")
    for name in OPTIONS:
        group.addoption(f"--cpcompile-{name}", metavar="PATH", type=Path, help=f"As `cpcompile check --{name}`.")
    group.addoption("--cpcompile-rounds", metavar="N", type=int, help="As `cpcompile check --rounds`.")
    for flag in ("without-model", "no-speed", "no-memory"):
        group.addoption(f"--cpcompile-{flag}", action="store_true", help=f"As `cpcompile check --{flag}`.")


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin only if a bundle is given."""
    if config.getoption("cpcompile") is not None:
        if config.getoption("cpcompile_baseline") is None:
            raise pytest.UsageError("--cpcompile needs --cpcompile-baseline")
        config.pluginmanager.register(_Plugin(config), "cpcompile-check")


class CheckFailedError(Exception):
    """A failed check, which a test shows without a traceback."""


class _Plugin:
    """The check of one pytest run, or of one of its workers, which use the folder of the run."""

    def __init__(self, config: pytest.Config) -> None:
        worker = getattr(config, "workerinput", None)
        self._own = worker is None
        self.folder = Path(worker[FOLDER] if worker else tempfile.mkdtemp(prefix="cpcompile-check-"))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """pytest-xdist is about to start a worker."""
        node.workerinput[FOLDER] = str(self.folder)

    def pytest_unconfigure(self) -> None:
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)

    @pytest.hookimpl(tryfirst=True)  # before the plugins that select tests
    def pytest_collection_modifyitems(
        self, session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        path = config.getoption("cpcompile").absolute()
        items.extend(_Bundle.from_parent(session, name=path.name, nodeid=path.name, path=path).collect())


class _Bundle(pytest.Collector):
    """All tests of one bundle."""

    def collect(self) -> list[pytest.Item]:
        return [_Criterion.from_parent(self, name="::".join(filter(None, key)), key=key) for key in self._keys()]

    def _keys(self) -> Iterator[tuple[str, str, str]]:
        """(context, variant, name of the outcome)."""
        if self.path.suffix == ".onnx":
            yield from (("", "", name) for name in FILE_TESTS)
            return
        from cpcompile.bundle.reader import open_bundle
        from cpcompile.check.baseline import read_baseline
        from cpcompile.check.criteria import expected
        from cpcompile.core.errors import CpcompileError

        try:
            before, bundle = read_baseline(self.config.getoption("cpcompile_baseline")), open_bundle(self.path)
            engines = [(context, each.name) for context in bundle.contexts for each in bundle.variants(context)]
        except CpcompileError as error:
            raise pytest.UsageError(str(error)) from error
        yield from ((*place, name) for place, name in expected(before))
        yield from ((*place, name) for place in engines if place not in before.places for name in ("present", "parity"))


class _Criterion(pytest.Item):
    """One criterion of one engine."""

    def __init__(self, *, key: tuple[str, str, str], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._key = key

    def runtest(self) -> None:
        outcome = _outcomes(self.config).get(self._key)
        if outcome is None:
            pytest.skip("the bundle does not have this engine")
        if outcome["verdict"] == "fail":
            raise CheckFailedError(outcome["sentence"])
        if outcome["verdict"] not in ("pass", "new"):
            pytest.skip(f"{outcome['verdict']}: {outcome['sentence']}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        return (
            str(excinfo.value) if isinstance(excinfo.value, CheckFailedError) else super().repr_failure(excinfo, style)
        )

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, ""  # pytest would write the dots of a name as ::


def _outcomes(config: pytest.Config) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The outcomes of the check of this run, by key; CheckFailedError if it could not run."""
    from cpcompile.files.whole_files import only_process

    plugin: Any = config.pluginmanager.get_plugin("cpcompile-check")
    result, trouble = plugin.folder / "check.json", plugin.folder / "trouble.txt"
    with only_process(plugin.folder / "lock"):
        if not result.exists() and not trouble.exists():
            command, environment = _command(config, result), _environment()
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if not result.exists():
                trouble.write_text(done.stderr.strip() or f"exit code {done.returncode}", encoding="utf-8")
    if trouble.exists():
        raise CheckFailedError(trouble.read_text(encoding="utf-8"))
    plain = json.loads(result.read_text(encoding="utf-8"))
    return {(each["context"] or "", each["variant"] or "", each["name"]): each for each in plain["outcomes"]}


def _command(config: pytest.Config, result: Path) -> list[str]:
    command = [sys.executable, "-m", "cpcompile", "check", str(config.getoption("cpcompile"))]
    for name in (*OPTIONS, "rounds"):
        if (value := config.getoption(f"cpcompile_{name}")) is not None:
            command += [f"--{name}", str(value)]
    for flag in ("without-model", "no-speed", "no-memory"):
        command += [f"--{flag}"] if config.getoption(f"cpcompile_{flag.replace('-', '_')}") else []
    return [*command, "--format", f"json={result}"]


def _environment() -> dict[str, str]:
    """The environment without GitHub's variables: pytest reports to GitHub, not the check."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}

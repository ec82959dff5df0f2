"""The plugin in a pytest of its own, with and without xdist; what it checks are ONNX files, which takes seconds."""

from __future__ import annotations

from pathlib import Path

import onnx.parser
import pytest

pytest_plugins = ["pytester"]


def write_onnx(path: Path, factor: float) -> None:
    """y = x * factor."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        graph (float[batch, 8] x) => (float[batch, 8] y) <float factor = {{{factor}}}> {{ y = Mul(x, factor) }}"""
    )
    onnx.save(model, path)


@pytest.fixture
def files(pytester: pytest.Pytester) -> Path:
    """base.onnx, same.onnx, and other.onnx, which computes something else."""
    write_onnx(pytester.path / "base.onnx", 2.0)
    write_onnx(pytester.path / "same.onnx", 2.0)
    write_onnx(pytester.path / "other.onnx", 2.01)
    return pytester.path


ARGUMENTS = ("--cpcompile-baseline", "base.onnx", "--cpcompile-no-speed", "-v", "-p", "no:cacheprovider")


@pytest.mark.parametrize("workers", [(), pytest.param(("-p", "xdist", "-n", "2"), marks=pytest.mark.slow)])
def test_every_criterion_is_a_test(files: Path, pytester: pytest.Pytester, workers: tuple[str, ...]) -> None:
    result = pytester.runpytest_subprocess("--cpcompile", "same.onnx", *ARGUMENTS, *workers)
    result.assert_outcomes(passed=4, skipped=1)
    result.stdout.fnmatch_lines_random(["*same.onnx::parity*", "*same.onnx::nodes*"])


@pytest.mark.slow
def test_a_failure_is_a_sentence(files: Path, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("--cpcompile", "other.onnx", *ARGUMENTS)
    result.assert_outcomes(passed=3, failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*FAILED*other.onnx::parity*"])
    assert "Traceback" not in result.stdout.str()


@pytest.mark.slow
def test_it_runs_beside_tests_of_the_project_and_one_alone(files: Path, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_own(): pass")
    both = pytester.runpytest_subprocess("--cpcompile", "same.onnx", *ARGUMENTS)
    both.assert_outcomes(passed=5, skipped=1)
    chosen = pytester.runpytest_subprocess("--cpcompile", "same.onnx", *ARGUMENTS, "-k", "parity")
    chosen.assert_outcomes(passed=1, deselected=5)


def test_without_a_bundle_it_does_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_own(): pass")
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_what_is_missing_is_said_once(files: Path, pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("--cpcompile", "same.onnx")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--cpcompile needs --cpcompile-baseline*"])
    result = pytester.runpytest_subprocess("--cpcompile", "none.cpc", "--cpcompile-baseline", "none.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*none.json: there is no such baseline*"])

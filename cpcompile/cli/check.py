"""`cpcompile check`: regression checks in CI."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cpcompile.cli.options import VERDICT_EXIT_CODES, FilePath, model_of, validation_table
from cpcompile.cli.settings import load_toml
from cpcompile.core.check_config import CheckConfig
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.overrides import override

if TYPE_CHECKING:
    from cpcompile.check.criteria import Check


@click.command(context_settings={"show_default": True})
@click.argument("subject", type=FilePath, metavar="BUNDLE")
@click.option(
    "--baseline",
    type=FilePath,
    required=True,
    help="File written by --update-baseline; for an .onnx file, an older one.",
)
@click.option("--model", type=FilePath, help="Model that BUNDLE was built from.  [default: BUNDLE with .pt or .pt2]")
@click.option("--without-model", is_flag=True, help="Check sizes, counts and placement only.")
@click.option("--data", type=FilePath, help="Corpus whose held-out text replaces that of the checkpoint.")
@click.option("--input", "inputs", type=FilePath, multiple=True, help="For .onnx: an .npz with inputs; repeatable.")
@click.option(
    "--config", type=FilePath, help="TOML file with [check] and [validate].  [default: cpcompile.toml, if any]"
)
@click.option("--rounds", type=int, help=f"Interleaved timing rounds per shape.  [default: {CheckConfig.rounds}]")
@click.option("--no-speed", is_flag=True, help="Skip the timings.")
@click.option("--no-memory", is_flag=True, help="Skip the memory measurements.")
@click.option("--update-baseline", is_flag=True, help="Write the baseline instead of comparing with it.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    default=["table"],
    metavar="NAME[=FILE]",
    help="table, json, junit, sarif or github, to standard output or a file; repeatable.",
)
def check(
    subject: Path,
    baseline: Path,
    model: Path | None,
    without_model: bool,
    data: Path | None,
    inputs: tuple[Path, ...],
    config: Path | None,
    rounds: int | None,
    no_speed: bool,
    no_memory: bool,
    update_baseline: bool,
    formats: tuple[str, ...],
) -> None:
    """Measure BUNDLE and compare it with its baseline: parity, quality, sizes, memory, speed. For CI.

    \b
    Examples:
      cpcompile check model.cpc --baseline base.json --update-baseline
      cpcompile check model.cpc --baseline base.json
      cpcompile check model.cpc --baseline base.json --format table --format junit=check.xml --format sarif=check.sarif
      cpcompile check model.cpc --baseline base.json --without-model
      cpcompile check new.onnx --baseline old.onnx

    The speed of a bundle is its speedup over the eager dense model, and that of a file its speedup over the baseline;
    both sides are timed now. A noisy value that misses its limit is measured again; it fails if its whole interval lies
    beyond the limit. Exit codes: 0 pass, 1 fail, 2 usage, 3 inconclusive.
    """
    from cpcompile.check.baseline import read_baseline, write_baseline
    from cpcompile.check.criteria import left_out
    from cpcompile.cli.console import stage_progress
    from cpcompile.files.arrays import load_inputs
    from cpcompile.pipeline.check import check_bundle, check_file

    targets = _targets(formats)
    own = Path("cpcompile.toml")
    file = config or (own if own.exists() else None)
    settings = override(CheckConfig(), load_toml(file).get("check", {}) if file else {}, where=f"{file}: check")
    settings = override(settings, {"rounds": rounds}, where="check")
    if subject.suffix == ".onnx":
        if update_baseline:
            raise UsageError(f"{subject}: the baseline of an ONNX file is an ONNX file; copy it to {baseline}")
        with stage_progress() as stage:
            given = [load_inputs(path, baseline) for path in inputs]
            result = check_file(subject, baseline, config=settings, inputs=given, speed=not no_speed, progress=stage)
    elif inputs:
        raise UsageError(f"{subject}: --input is for .onnx files; a bundle is measured on text, see --data")
    else:
        before = None if update_baseline else read_baseline(baseline)
        with stage_progress() as stage:
            now, result = check_bundle(
                subject,
                None if without_model else model or model_of(subject),
                before,
                baseline=baseline,
                data=data,
                config=settings,
                validation=validation_table(file),
                speed=not no_speed,
                memory=not no_memory,
                progress=stage,
            )
        if update_baseline:
            _require_sound(result)
            write_baseline(now, baseline)
            click.echo(f"wrote {baseline}", err=True)
            for note in result.notes:
                click.echo(f"Warning: {note}", err=True)
            for reason, names in _by_value(left_out(now)).items():
                click.echo(f"Warning: no check will judge {', '.join(names)}: {reason}", err=True)
            return
    _print_check(result, targets)
    sys.exit(VERDICT_EXIT_CODES[result.verdict])


def _targets(formats: tuple[str, ...]) -> list[tuple[str, Path | None]]:
    """(format, file or None for standard output) of each `--format`."""
    from cpcompile.check.formats import FORMATS

    targets = []
    for text in formats:
        name, equals, file = text.partition("=")
        if name not in FORMATS or (equals and not file):
            raise UsageError(f"--format {text}: give one of {', '.join(FORMATS)}, or one of them with =FILE")
        targets.append((name, Path(file) if file else None))
    printed = [name for name, file in targets if file is None]
    if len(printed) > 1 and (whole := [name for name in printed if name in ("json", "junit", "sarif")]):
        raise UsageError(f"--format {' and '.join(printed)} would mix on standard output; give {whole[0]}=FILE")
    return targets


def _by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    return {value: [name for name in values if values[name] == value] for value in values.values()}


def _require_sound(result: Check) -> None:
    """Refuse to write a baseline from a bundle that fails."""
    wrong = [outcome for outcome in result.outcomes if outcome.verdict == "fail"]
    if wrong:
        raise CpcompileError(
            f"{wrong[0].place}: {wrong[0].name} fails ({wrong[0].reason}); the baseline is unchanged: fix the "
            "bundle first"
        )


def _print_check(result: Check, targets: Sequence[tuple[str, Path | None]]) -> None:
    """Print the result in the requested formats, and for GitHub when it runs there."""
    from cpcompile.check.formats import TABLE, TEXTS, summary
    from cpcompile.check.formats.table import render_check
    from cpcompile.cli.console import print_result
    from cpcompile.files.whole_files import whole_file

    for name, file in targets:
        if file is None:
            print_result(render_check(result)) if name == TABLE else click.echo(TEXTS[name](result), nl=False)
            continue
        with whole_file(file) as temporary:
            if name == TABLE:
                with temporary.open("w", encoding="utf-8") as stream:
                    print_result(render_check(result), stream)
            else:
                temporary.write_text(TEXTS[name](result), encoding="utf-8")
    if os.environ.get("GITHUB_ACTIONS") == "true" and ("github", None) not in targets:
        click.echo(TEXTS["github"](result), nl=False, err=True)  # GitHub reads both streams
    if step := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(step).open("a", encoding="utf-8", errors="replace") as stream:
                stream.write(summary(result))
        except OSError as error:  # the verdict is not affected
            click.echo(f"Warning: GITHUB_STEP_SUMMARY={step}: no summary was written ({error.strerror})", err=True)

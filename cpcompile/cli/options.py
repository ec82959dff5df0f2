"""Shared by several commands: option types, the names in an option, verdicts as exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cpcompile.cli.sizes import parse_size
from cpcompile.core.config import (
    BuildConfig,
    ValidateConfig,
)
from cpcompile.core.errors import UsageError
from cpcompile.core.json_form import to_json

if TYPE_CHECKING:
    from cpcompile.report import Report

FilePath = click.Path(path_type=Path)
VERDICT_EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}
max_memory_option = click.option(
    "--max-memory",
    metavar="SIZE",
    callback=lambda _context, _option, text: None if text is None else parse_size(text),
    help="Refuse to start if the build needs more memory than this (2GB, 1500MiB); see `estimate`.",
)


def beside(path: Path, suffix: str) -> Path:
    """`path` with another suffix; this also works for `.`, which has no name."""
    path = path if path.name else path.absolute()
    return path.with_name(f"{path.stem}{suffix}") if path.name else path


def model_of(bundle: Path) -> Path:
    """The model next to `bundle`; the .pt path if there is neither."""
    program = beside(bundle, ".pt2")
    return program if program.exists() and not beside(bundle, ".pt").exists() else beside(bundle, ".pt")


def validate_config(
    rounds: int, min_speed_ratio: float, peers: str | None, *, no_speed: bool, no_memory: bool, layers: bool
) -> ValidateConfig:
    """How to validate, from the options of `build` and `validate`."""
    return ValidateConfig(
        rounds=rounds,
        min_speed_ratio=min_speed_ratio,
        peers=names_in(peers) or (),
        speed=not no_speed,
        memory=not no_memory,
        layers=layers,
    )


def warn_of_memory(model: Path, max_memory: int | None, config: BuildConfig, validation: ValidateConfig) -> None:
    """Refuse work that needs more than `max_memory`; warn if the machine may not have enough."""
    from cpcompile.pipeline.estimation import check_memory

    warning = check_memory(model, max_memory, config, validation)
    if warning is not None:
        click.echo(f"Warning: {warning}", err=True)


def names_in(text: str | None) -> tuple[str, ...] | None:
    """The names in a comma-separated list, each once."""
    if text is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"{text!r} names nothing; separate names by commas, or leave the option out")
    return names


def print_report(report: Report, *, as_json: bool = False) -> None:
    """Print tables, or the content of report.json."""
    if as_json:
        click.echo(json.dumps(to_json(report), indent=1))
        return
    from cpcompile.cli.console import print_result
    from cpcompile.report import render_report

    print_result(render_report(report))


def exit_with(report: Report) -> None:
    """End with the exit code of the verdict."""
    sys.exit(VERDICT_EXIT_CODES[report.verdict])

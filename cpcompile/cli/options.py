"""Shared by several commands: option types, groups of options, the names in an option, verdicts as exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cpcompile.cli.settings import load_toml
from cpcompile.cli.sizes import parse_size
from cpcompile.core.config import BuildConfig, ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.json_form import to_json
from cpcompile.core.overrides import override

if TYPE_CHECKING:
    from cpcompile.report import Report

Command = TypeVar("Command", bound=Callable[..., Any])
FilePath = click.Path(path_type=Path)
VERDICT_EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}
_VALIDATION_OPTIONS = (
    click.option("--data", type=FilePath, help="Corpus whose held-out text replaces that of the checkpoint."),
    click.option("--config", type=FilePath, help="TOML file with the table [validate]; options override it."),
    click.option(
        "--rounds", type=int, help=f"Interleaved timing rounds per shape.  [default: {ValidateConfig.rounds}]"
    ),
    click.option(
        "--jobs",
        type=int,
        metavar="N",
        help="Compare N contexts with the eager model at once, each in its own process; timings run one at a time.  "
        f"[default: {ValidateConfig.jobs}]",
    ),
    click.option(
        "--max-perplexity-increase",
        type=float,
        metavar="PART",
        help="Part by which the mean perplexity may exceed that of the dense baseline.  "
        f"[default: {ValidateConfig.max_perplexity_increase}]",
    ),
    click.option(
        "--min-speed-ratio", type=float, help="Minimum speedup over the eager dense model; 0 for none.  [default: 0]"
    ),
    click.option(
        "--peers",
        metavar="NAMES",
        help="Peers to time with the engines, or 'all' or 'none'; see `validate --help`.  "
        f"[default: {','.join(ValidateConfig.peers)}]",
    ),
    click.option("--no-speed", is_flag=True, help="Skip the timings."),
    click.option("--no-memory", is_flag=True, help="Skip the memory measurements."),
    click.option("--no-layers", is_flag=True, help="Skip the errors of single layers."),
    click.option("--repro", type=FilePath, metavar="DIR", help="Folder for a minimal repro if parity fails."),
    click.option(
        "--max-memory",
        metavar="SIZE",
        callback=lambda _context, _option, text: None if text is None else parse_size(text),
        help="Refuse to start if the build needs more memory than this (2GB, 1500MiB); see `estimate`.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print report.json instead of tables."),
)


def validation_options(command: Command) -> Command:
    """Give `command` the options of a validation; `validate_config` takes those that it does not name itself."""
    for option in reversed(_VALIDATION_OPTIONS):
        command = option(command)
    return command


def validate_config(
    config: Path | None, *, peers: str | None, no_speed: bool, no_memory: bool, no_layers: bool, **settings: Any
) -> ValidateConfig:
    """How to validate: the table [validate] of the file `config`, and the options over it."""
    if no_speed and peers is not None:
        raise UsageError(f"--peers {peers} needs timings: leave out --no-speed or --peers")
    switched_off = {"speed": no_speed, "memory": no_memory, "layers": no_layers}
    flags = settings | {"peers": names_in(peers)} | {name: False for name, off in switched_off.items() if off}
    return override(validation_table(config), flags, where="validate")


def validation_table(config: Path | None) -> ValidateConfig:
    """The table [validate] of the file `config`, or the defaults."""
    return override(
        ValidateConfig(), load_toml(config).get("validate", {}) if config else {}, where=f"{config}: validate"
    )


def beside(path: Path, suffix: str) -> Path:
    """`path` with another suffix; this also works for `.`, which has no name."""
    path = path if path.name else path.absolute()
    return path.with_name(f"{path.stem}{suffix}") if path.name else path


def model_of(bundle: Path) -> Path:
    """The model next to `bundle`; the .pt path if there is neither."""
    program = beside(bundle, ".pt2")
    return program if program.exists() and not beside(bundle, ".pt").exists() else beside(bundle, ".pt")


def warn_of_memory(model: Path, max_memory: int | None, config: BuildConfig, validation: ValidateConfig) -> None:
    """Refuse work that needs more than `max_memory`; warn if the machine may not have enough."""
    from cpcompile.cli.console import stage_progress
    from cpcompile.pipeline.estimation import check_memory

    with stage_progress() as stage:
        warning = check_memory(model, max_memory, config, validation, stage)
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

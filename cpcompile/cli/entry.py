"""The command line: every command, in the order in which `cpcompile --help` lists them.

Exit codes: 0 pass, 1 fail, 2 usage, 3 inconclusive.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from cpcompile.cli.build import build, estimate
from cpcompile.cli.calibrate import calibrate
from cpcompile.cli.check import check
from cpcompile.cli.graphs import compare, export, opt, passes
from cpcompile.cli.group import main
from cpcompile.cli.inspect import inspect
from cpcompile.cli.options import FilePath, exit_with, print_report
from cpcompile.cli.run import run
from cpcompile.cli.train import run_training, train
from cpcompile.cli.validate import report, validate

__all__ = ["main"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def doctor(as_json: bool) -> None:
    """Show what is installed, which targets really work, and the commands that fix the rest.

    \b
    Examples:
      cpcompile doctor
      cpcompile doctor --json

    Each target is tried by creating a session or a Builder. The exit code is 0 if CPU engines run here, 1 if not, or if
    something that building them needs is broken. The extra `build` may be missing.
    """
    from cpcompile.doctor.examination import examine

    examination = examine()
    if as_json:
        click.echo(json.dumps(examination.as_json(), indent=1))
    else:
        try:
            from cpcompile.cli.console import print_result
            from cpcompile.doctor.table import render_examination
        except ImportError:  # without rich, which is among the findings then
            from cpcompile.doctor.plain import plain_examination

            click.echo(plain_examination(examination))
        else:
            print_result(render_examination(examination))
    sys.exit(0 if examination.healthy else 1)


@click.command(context_settings={"show_default": True})
@click.option("--out", "-o", type=FilePath, default="demo", help="Folder for corpus, checkpoint, bundle and report.")
def demo(out: Path) -> None:
    """Train, build and validate on text already on your machine: Python, C++ and English.

    The demo takes about ten minutes on two cores and 2 GB of memory. Run it again to resume after an interruption.

    \b
    Example:
      cpcompile demo --out demo
    """
    from cpcompile.cli.demo import run_demo

    exit_with(run_demo(out, train=run_training, show=print_report))


for command in (
    *(train, calibrate, build, estimate, validate, report, check, inspect, run, export),
    *(opt, compare, doctor, passes, demo),
):
    main.add_command(command)

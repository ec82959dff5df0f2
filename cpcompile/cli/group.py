"""The group of commands: its help, and errors as one sentence with an exit code."""

from __future__ import annotations

import errno
import io
import sys
from typing import Any

import click

from cpcompile.cli.interruption import message_and_exit_code, terminable
from cpcompile.core.errors import CpcompileError, UsageError, first_line, printable
from cpcompile.core.extras import missing_extra
from cpcompile.core.version import __version__

NO_MEMORY = "not enough memory"
"""Part of the message of torch's RuntimeError when an allocation fails."""


class _Group(click.Group):
    """Maps our errors and interruptions to exit codes; tracebacks only with --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with terminable():
                return super().invoke(ctx)
        except KeyboardInterrupt as interruption:
            message, exit_code = message_and_exit_code(interruption)
            click.echo(message, err=True)
            ctx.exit(exit_code)
        except CpcompileError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {printable(str(error))}", err=True)
            ctx.exit(error.exit_code)
        except ImportError as error:  # of a package that is not installed, or half
            if ctx.params.get("debug") or error.name is None or error.name.partition(".")[0] == "cpcompile":
                raise
            if (sentence := missing_extra(error, f"`cpcompile {ctx.invoked_subcommand}`")) is not None:
                click.echo(f"Error: {sentence}", err=True)
                ctx.exit(UsageError.exit_code)
            click.echo(
                f"Error: {first_line(error)}; `cpcompile doctor` says what is missing and how to install it", err=True
            )
            ctx.exit(1)
        except OSError as error:
            if ctx.params.get("debug") or error.errno == errno.EPIPE:  # click ends quietly when the reader is gone
                raise
            where = f"{error.filename}: " if error.filename is not None else ""
            click.echo(f"Error: {where}{error.strerror or error}", err=True)
            ctx.exit(1)
        except (MemoryError, RuntimeError) as error:
            if ctx.params.get("debug") or not (isinstance(error, MemoryError) or NO_MEMORY in str(error)):
                raise
            click.echo("Error: out of memory; use a smaller model, batch or sequence", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="cpcompile")
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
def main(debug: bool) -> None:
    """Train one model for many contexts; compile each context into its own small, validated engine.

    \b
    cpcompile demo                                # the whole workflow on text already on your machine
    cpcompile train --data corpus/ --out model.pt
    cpcompile calibrate model.pt --data corpus/   # better low-bit weights
    cpcompile estimate model.pt                   # memory and size of a build, before it starts
    cpcompile build model.pt -o model.cpc
    cpcompile validate model.cpc --model model.pt
    cpcompile report before.json model.cpc        # what changed
    cpcompile check model.cpc --baseline base.json
    cpcompile inspect model.cpc                   # what is in it, and how to load it
    cpcompile run model.cpc --context english "Return the "
    cpcompile export model.cpc english -o english.onnx
    cpcompile opt any.onnx -o smaller.onnx
    cpcompile compare any.onnx smaller.onnx
    cpcompile doctor                              # what works here, and the commands that fix the rest
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows a question mark, no traceback

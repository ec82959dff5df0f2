"""`cpcompile calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from cpcompile.cli.options import FilePath, names_in
from cpcompile.core.config import ROUNDED


@click.command(context_settings={"show_default": True})
@click.argument("model", type=FilePath)
@click.option("--data", type=FilePath, required=True, help="The text that MODEL was trained on, or text like it.")
@click.option(
    "--tokens", type=click.IntRange(1), default=8192, help="Training text that is read for each context, at most."
)
@click.option(
    "--precision", "precisions", default=",".join(ROUNDED), help="Precisions of the engines that you want to build."
)
def calibrate(model: Path, data: Path, tokens: int, precisions: str) -> None:
    """Choose how the weights of MODEL are rounded, so that their errors make up for each other (GPTQ, SmoothQuant).

    \b
    Examples:
      cpcompile calibrate model.pt --data corpus/
      cpcompile calibrate model.pt --data corpus/ --precision int4-weights
      cpcompile build model.pt --target cpu --precision int4-weights
      cpcompile build model.pt --target best

    It writes model.calibration.pt beside model.pt, and builds use that file from then on wherever weights are rounded.
    Without it, they are rounded to the nearest numbers. Fewer precisions take less time, and so do fewer tokens, which
    give worse weights. The file is written anew: name all precisions that you build.
    """
    from cpcompile.cli.console import console, stage_progress
    from cpcompile.pipeline.calibrate import calibrate_model

    with stage_progress() as progress:
        path = calibrate_model(model, data, tokens=tokens, precisions=names_in(precisions) or (), progress=progress)
    console.print(f"wrote {path}; builds of {model} use it wherever weights are rounded")

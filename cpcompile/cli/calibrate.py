"""`cpcompile calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from cpcompile.cli.options import FilePath


@click.command(context_settings={"show_default": True})
@click.argument("model", type=FilePath)
@click.option("--data", type=FilePath, required=True, help="The text that MODEL was trained on, or text like it.")
@click.option(
    "--tokens", type=click.IntRange(1), default=8192, help="Training text that is read for each context, at most."
)
def calibrate(model: Path, data: Path, tokens: int) -> None:
    """Choose the 4-bit weights of MODEL so that their errors make up for each other (GPTQ).

    \b
    Examples:
      cpcompile calibrate model.pt --data corpus/
      cpcompile build model.pt --target cpu --precision int4-weights
      cpcompile build model.pt --target best

    It writes model.calibration.pt beside model.pt, and builds use that file from then on wherever a weight gets 4 bits.
    Without it, weights are rounded to the nearest numbers. Fewer tokens take less time and give worse weights.
    """
    from cpcompile.cli.console import console, stage_progress
    from cpcompile.pipeline.calibrate import calibrate_model

    with stage_progress() as progress:
        path = calibrate_model(model, data, tokens=tokens, progress=progress)
    console.print(f"wrote {path}; builds of {model} use it wherever a weight gets 4 bits")

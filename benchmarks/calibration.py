"""What rounding costs in every precision: to the nearest numbers, and as `cpcompile calibrate` chose them.

   cpcompile calibrate model.pt --data corpus/
   python benchmarks/calibration.py model.pt

The perplexity is that of the eager model with weights and inputs rounded as engines round them, against float32, on the
windows of held-out text that a search does not see. Where all inputs of a product have one scale, also with a few
products left in float32, as `--target best` mixes them: those whose rounding costs most for their size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from common import save
from mixed_precision import by_cost, increase, opened
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cpcompile.core.config import ROUNDED
from cpcompile.core.rounding import SCHEMES, UNCALIBRATED
from cpcompile.frontend.source import TrainedSource, open_source
from cpcompile.validation.language_reference import OTHERS
from cpcompile.validation.sensitivity import rounding_costs

EXACT = (0, 0.02, 0.05, 0.1)
"""Parts of the weights that stay in float32."""


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default="demo/model.pt")
@click.option("--name", default="calibration", help="Name of the file of results.")
def main(model: Path, name: str) -> None:
    source = open_source(model)
    assert isinstance(source, TrainedSource)
    if not source.calibration:
        raise click.UsageError(f"{model}: has no calibration beside it; run `cpcompile calibrate`")
    references = {"nearest": opened(source, UNCALIBRATED), "calibrated": opened(source, source.calibration)}
    exact = {c: (r := references["nearest"]).window_losses(c, r.masked(c), OTHERS) for c in source.contexts}
    sizes = source.parameter_sizes()
    whole = sum(sizes[each] for each in source.calibration)
    rows: list[dict[str, Any]] = []
    for precision in track(ROUNDED, "precisions"):
        scheme = SCHEMES[precision]
        fitting = [each for each, known in source.calibration.items() if precision in known]
        own = [dict[str, Any](precision=precision, exact=part) for part in (EXACT if scheme.smooths else EXACT[:1])]
        for how, reference in references.items():
            order = fitting
            if len(own) > 1:
                costs = rounding_costs(
                    reference, dict.fromkeys(source.contexts, fitting), scheme, steps=lambda *_: None
                )
                order = by_cost(costs, sizes)
            for row in own:
                left = 0
                while left < len(order) and sum(sizes[each] for each in order[: left + 1]) <= row["exact"] * whole:
                    left += 1
                row[f"{how}_products"] = left
                row[how] = increase(reference, dict.fromkeys(order[left:], precision), exact)
        rows += own
    table = Table(title=f"{model.stem}: what rounding costs in perplexity")
    for column in ("precision", "weights in float32", *references):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["precision"], f"{row['exact']:.0%}", *(f"{row[how]:+.2%}" for how in references))
    Console(width=120).print(table)
    tokens = sum(each.size for each in exact.values()) * source.sequence
    save(name, {"model": model.stem, "tokens": tokens, "precisions": rows})


if __name__ == "__main__":
    main()

"""Quality against bits: 4 bits for most weights, 8 for those that cost most, as `--target best` mixes them.

   python benchmarks/mixed_precision.py demo/model.pt

The costs of all parameters are estimated on the windows of held-out text that a search sees; the perplexity is that of
the eager model on the others, with the weights and inputs rounded as engines round them, against float32. Bits include
the scales. A control mixes as many bits in a random order. Beside a model that `cpcompile calibrate` has read, the same
with the numbers that it chose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np
from common import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cpcompile.core.config import ValidateConfig
from cpcompile.core.rounding import SCHEMES, UNCALIBRATED, Calibration
from cpcompile.frontend.source import TrainedSource, open_source
from cpcompile.validation.language_reference import OTHERS, LanguageReference
from cpcompile.validation.open_reference import open_reference
from cpcompile.validation.sensitivity import rounding_costs

FEW, MANY = "int4-weights", "int8-weights"
PARTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
"""Of the weights that have 8 bits."""


def rounded_parameters(source: TrainedSource) -> dict[str, tuple[int, int]]:
    """Matrices whose input channels fall into blocks, (inputs, outputs): what engines round if nothing is cut."""
    shapes = {name: tuple(tensor.shape) for name, tensor in source.checkpoint.model.named_parameters()}
    matrices = {name: shapes[name][::-1] for name in source.parameter_sizes() if len(shapes[name]) == 2}
    return {name: shape for name, shape in matrices.items() if SCHEMES[FEW].fits(shape[0])}


def mixture(order: Sequence[str], sizes: Mapping[str, int], part: float) -> dict[str, str]:
    """The scheme of every parameter: 8 bits for the first of `order`, up to that part of all weights."""
    before = np.cumsum([0, *(sizes[name] for name in order)])[:-1] / sum(sizes.values())
    return {name: MANY if start < part else FEW for name, start in zip(order, before, strict=True)}


def by_cost(costs: Mapping[str, float], sizes: Mapping[str, int]) -> list[str]:
    """The parameters, the costliest for their size first."""
    return sorted(costs, key=lambda each: costs[each] / sizes[each], reverse=True)


def opened(source: TrainedSource, calibration: Calibration) -> LanguageReference:
    """The reference of `source`, with parameters rounded so."""
    config = ValidateConfig()
    found = open_reference(source, config, data=None, trimmed={}, progress=lambda *_: None, calibration=calibration)
    assert isinstance(found, LanguageReference)
    return found


def increase(reference: LanguageReference, schemes: Mapping[str, str], exact: Mapping[str, np.ndarray]) -> float:
    """Of the mean perplexity over the contexts, over that in float32."""
    chosen = {name: SCHEMES[scheme] for name, scheme in schemes.items()}
    losses = [reference.window_losses(c, reference.masked(c, chosen), OTHERS).mean() - exact[c].mean() for c in exact]
    return math.expm1(float(np.mean(losses)))


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default="demo/model.pt")
@click.option("--name", default="mixed_precision", help="Name of the file of results.")
def main(model: Path, name: str) -> None:
    source = open_source(model)
    assert isinstance(source, TrainedSource)
    reference = opened(source, UNCALIBRATED)
    shapes = rounded_parameters(source)
    sizes = {each: math.prod(shape) for each, shape in shapes.items()}
    started = time.perf_counter()
    contexts = {context: list(shapes) for context in source.contexts}
    costs = rounding_costs(reference, contexts, SCHEMES[FEW], steps=lambda *_: None)
    seconds = time.perf_counter() - started
    exact = {c: reference.window_losses(c, reference.masked(c), OTHERS) for c in source.contexts}

    def bits(schemes: Mapping[str, str]) -> float:
        return sum(sizes[p] * SCHEMES[schemes[p]].bits_per_weight(shapes[p][0]) for p in schemes) / sum(sizes.values())

    order = by_cost(costs, sizes)
    at_random = np.random.default_rng(0).permutation(order).tolist()
    if source.calibration:
        calibrated = opened(source, source.calibration)
        other_costs = rounding_costs(calibrated, contexts, SCHEMES[FEW], steps=lambda *_: None)
        other_order = by_cost(other_costs, sizes)
    rows = []
    for part in track(PARTS, "mixtures"):
        own, control = (mixture(each, sizes, part) for each in (order, at_random))
        row = {"part": part, "bits": bits(own), "increase": increase(reference, own, exact)}
        mixed = 0 < part < 1
        row["random_increase"] = increase(reference, control, exact) if mixed else row["increase"]
        if source.calibration:
            other = mixture(other_order, sizes, part)
            row |= {"calibrated_bits": bits(other), "calibrated_increase": increase(calibrated, other, exact)}
        rows.append(row)
    table = Table(title=f"{model.stem}: 4 and 8 bits mixed; costs estimated in {seconds:.0f} s")
    columns = ("weights in 8 bits", "bits a weight", "perplexity", "random order", "bits, calibrated", "calibrated")
    forms = (".0%", ".2f", "+.2%", "+.2%", ".2f", "+.2%")
    for column, _ in zip(columns, rows[0], strict=False):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:{form}}" for value, form in zip(row.values(), forms, strict=False)))
    Console(width=120).print(table)
    tokens = sum(each.size for each in exact.values()) * reference.sequence
    save(name, {"model": model.stem, "tokens": tokens, "seconds_for_costs": seconds, "mixtures": rows})


if __name__ == "__main__":
    main()

"""Quality against bits: 4 bits for most weights, 8 for those that cost most, as `--target best` mixes them.

   python benchmarks/mixed_precision.py demo/model.pt

The costs of all parameters are estimated on the windows of held-out text that a search sees; the perplexity is that of
the eager model on the others, with the weights and inputs rounded as engines round them, against float32. Bits include
the scales. A control mixes as many bits in a random order. --compensated adds the same mixtures with the parameters in
4 bits compensated, on the windows that a search sees.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from common import save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cpcompile.core.config import ValidateConfig
from cpcompile.core.rounding import SCHEMES
from cpcompile.core.types import Array
from cpcompile.frontend.source import TrainedSource, open_source
from cpcompile.validation.compensation import compensated_parameters
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


def having(source: TrainedSource, values: Mapping[str, Array]) -> LanguageReference:
    """The reference of `source` with other values of some parameters."""
    made = source.checkpoint
    state = {**made.state, **{name: torch.from_numpy(value) for name, value in values.items()}}
    text = {"held_out": made.held_out, "sequence": source.sequence}
    return LanguageReference(dataclasses.replace(made, state=state), None, ValidateConfig(), **text)


def increase(reference: LanguageReference, schemes: Mapping[str, str], exact: Mapping[str, np.ndarray]) -> float:
    """Of the mean perplexity over the contexts, over that in float32."""
    chosen = {name: SCHEMES[scheme] for name, scheme in schemes.items()}
    losses = [reference.window_losses(c, reference.masked(c, chosen), OTHERS).mean() - exact[c].mean() for c in exact]
    return math.expm1(float(np.mean(losses)))


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default="demo/model.pt")
@click.option("--name", default="mixed_precision", help="Name of the file of results.")
@click.option("--compensated", is_flag=True, help="Also with the parameters in 4 bits compensated.")
def main(model: Path, name: str, compensated: bool) -> None:
    source = open_source(model)
    assert isinstance(source, TrainedSource)
    reference = open_reference(source, ValidateConfig(), data=None, trimmed={}, progress=lambda *_: None)
    assert isinstance(reference, LanguageReference)
    shapes = rounded_parameters(source)
    sizes = {each: math.prod(shape) for each, shape in shapes.items()}
    started = time.perf_counter()
    contexts = {context: list(shapes) for context in source.contexts}
    costs = rounding_costs(reference, contexts, SCHEMES[FEW], steps=lambda *_: None)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    values = compensated_parameters(reference, contexts, SCHEMES[FEW], steps=lambda *_: None) if compensated else {}
    seconds_for_values = time.perf_counter() - started
    exact = {c: reference.window_losses(c, reference.masked(c), OTHERS) for c in source.contexts}
    by_cost = sorted(costs, key=lambda each: costs[each] / sizes[each], reverse=True)
    at_random = np.random.default_rng(0).permutation(by_cost).tolist()
    rows = []
    for part in track(PARTS, "mixtures"):
        own, control = (mixture(order, sizes, part) for order in (by_cost, at_random))
        bits = sum(sizes[each] * SCHEMES[own[each]].bits_per_weight(shapes[each][0]) for each in own)
        row = {"part": part, "bits": bits / sum(sizes.values()), "increase": increase(reference, own, exact)}
        mixed = 0 < part < 1
        row["random_increase"] = increase(reference, control, exact) if mixed else row["increase"]
        if compensated:
            few = {each: value for each, value in values.items() if own[each] == FEW}
            row["compensated_increase"] = increase(having(source, few), own, exact)
        rows.append(row)
    table = Table(title=f"{model.stem}: 4 and 8 bits mixed; costs estimated in {seconds:.0f} s")
    columns = ("weights in 8 bits", "bits a weight", "perplexity", "random order", "compensated")
    forms = (".0%", ".2f", "+.2%", "+.2%", "+.2%")
    for column, _ in zip(columns, rows[0], strict=False):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:{form}}" for value, form in zip(row.values(), forms, strict=False)))
    Console(width=120).print(table)
    tokens = sum(each.size for each in exact.values()) * reference.sequence
    measured = {"model": model.stem, "tokens": tokens, "seconds_for_costs": seconds}
    save(name, measured | ({"seconds_for_values": seconds_for_values} if compensated else {}) | {"mixtures": rows})


if __name__ == "__main__":
    main()

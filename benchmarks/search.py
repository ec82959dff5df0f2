"""Whether `--target best` keeps its budget on text that it did not see, and whether its choice is the fastest.

   python benchmarks/search.py demo/corpus

For each seed a model of preset tiny is trained on the corpus, briefly. Its budget lies so that float32 is surely within
it and 4 bits everywhere are not: a third of the way from one to the other, and two standard errors. The search chooses
on half of the held-out text; the increase on the other half is compared with the budget. Then all candidates are timed
again, side by side.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import onnx_ir as ir
from common import save
from rich.console import Console
from rich.table import Table

from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.config import ROUNDED, BuildConfig, TrainConfig, ValidateConfig, preset
from cpcompile.frontend.source import Source, open_source
from cpcompile.pipeline.build import freeze_contexts
from cpcompile.pipeline.search import CONFIDENCE, Search
from cpcompile.pipeline.stored_weights import wholes
from cpcompile.pipeline.write_engines import export_engines
from cpcompile.text.corpus import load_corpus
from cpcompile.training.trainer import train
from cpcompile.validation.language_reference import LanguageReference
from cpcompile.validation.open_reference import open_reference

LOOSE = 100.0
"""A budget within which everything is."""
CONFIG = BuildConfig()


def quiet(_stage: str, _done: int, _total: int | None) -> None: ...


@contextmanager
def searching(source: Source, dynamic: ir.Model, budget: float, folder: Path) -> Iterator[Search]:
    """A search as a build makes it, without the build."""
    validation = ValidateConfig(max_perplexity_increase=budget)
    reference = open_reference(source, validation, data=None, trimmed={}, progress=quiet)
    assert isinstance(reference, LanguageReference)
    frozen, accounts = freeze_contexts(source, dynamic, source.contexts, {}, None, lambda: None)
    own = {context: replace(each, model=each.model.clone()) for context, each in frozen.items()}
    with BundleWriter(folder / "model.cpc") as writer:
        metadata = export_engines(writer, dynamic, frozen, accounts, source, {}, CONFIG, lambda: None)
        parameters = wholes(dynamic, own, accounts)
        with Search(writer.stage("search"), own, parameters, reference, metadata, CONFIG, validation, quiet) as search:
            yield search


def measure(model: Path) -> dict[str, Any]:
    """Search for the best precision of `model` under a budget that excludes some, and time all candidates again."""
    source = open_source(model)
    dynamic = source.capture(opset=CONFIG.opset)
    with searching(source, dynamic, LOOSE, model.parent) as search:
        exact, few = search.best(("int4-weights",)).record.candidates
    least = math.log1p(exact.increase) + CONFIDENCE * exact.increase_error
    budget = math.expm1(least + (math.log1p(few.increase) - math.log1p(exact.increase)) / 3)
    with searching(source, dynamic, budget, model.parent) as search:
        record = search.best(ROUNDED).record
        again = {name: relative for name, (_, relative) in search.latencies().items()}
    allowed = [each.name for each in record.candidates if each.within_budget]
    return {
        "budget": budget,
        "chosen": record.chosen,
        "other_increase": record.other_increase,
        "other_increase_error": record.other_increase_error,
        "slower_than_the_fastest": again[record.chosen] / min(again[name] for name in allowed) - 1,
        "candidates": {
            each.name: {
                "increase": each.increase,
                "increase_error": each.increase_error,
                "bits": each.bits_per_weight,
                "relative_time": each.relative_time,
                "relative_time_again": again[each.name],
                "within_budget": each.within_budget,
            }
            for each in record.candidates
        },
    }


def holds(row: Mapping[str, Any], errors: float) -> bool:
    """Whether the increase on the other half is within the budget, so many standard errors allowed."""
    logarithm = math.log1p(row["other_increase"]) - errors * row["other_increase_error"]
    return bool(logarithm <= math.log1p(row["budget"]))


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path, exists=True), default="demo/corpus")
@click.option("--seeds", default=20)
@click.option("--steps", default=60)
@click.option("--name", default="search", help="Name of the file of results.")
def main(corpus: Path, seeds: int, steps: int, name: str) -> None:
    config, rows = preset("tiny"), []
    table = Table(title=f"--target best on {seeds} models of preset tiny")
    for column in ("seed", "budget", "chosen", "on other text", "budget kept", "slower than the fastest"):
        table.add_column(column, justify="right")
    for seed in range(seeds):
        training = TrainConfig(seed=seed, steps=steps)
        text = load_corpus(
            corpus,
            vocabulary=config.vocabulary,
            sequence=training.sequence,
            held_out_fraction=training.held_out_fraction,
            seed=seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model.pt"
            train(text, config, training, model)
            row = measure(model)
        rows.append({"seed": seed, **row})
        other = f"{row['other_increase']:+.2%} ± {CONFIDENCE * row['other_increase_error']:.2%}"
        kept = "yes" if holds(row, 0) else "within the error" if holds(row, CONFIDENCE) else "no"
        cells = [str(seed), f"{row['budget']:.2%}", row["chosen"], other, kept, f"{row['slower_than_the_fastest']:.1%}"]
        table.add_row(*cells)
        print(*cells, flush=True)
    Console(width=120).print(table)
    save(name, {"steps": steps, "rows": rows})


if __name__ == "__main__":
    main()

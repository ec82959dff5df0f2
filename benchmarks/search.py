"""Whether `--target best` keeps its budget on text that it did not see, and whether its choice is the fastest.

   python benchmarks/search.py demo/corpus

For each seed a model of preset tiny is trained briefly on two contexts of the corpus, which keep everything. It becomes
its own dense baseline and writes its own held-out text, which nothing predicts better: candidates lose by rounding
alone. The budget is a third of what 4 bits everywhere cost. The search chooses on half of the text; the increase on the
other half is compared with the budget. Then all candidates are timed again, side by side.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import torch
from common import RESULTS, save
from rich.console import Console
from rich.table import Table

from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.config import ROUNDED, BuildConfig, TrainConfig, ValidateConfig, preset
from cpcompile.core.paths import dense_path
from cpcompile.frontend.checkpoint import load_checkpoint, save_checkpoint
from cpcompile.frontend.source import Source, open_source
from cpcompile.machine.environment import environment
from cpcompile.models.language_model import KeysValues, LanguageModel
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
WHOLE = {"ffn": 1.0, "head": 1.0}
WINDOWS, LENGTH = 128, TrainConfig.sequence


def quiet(_stage: str, _done: int, _total: int | None) -> None: ...


@contextmanager
def searching(
    source: Source, dynamic: ir.Model, budget: float, folder: Path, rounds: int = ValidateConfig.rounds
) -> Iterator[Search]:
    """A search as a build makes it, without the build."""
    validation = ValidateConfig(max_perplexity_increase=budget, rounds=rounds)
    reference = open_reference(source, validation, data=None, trimmed={}, progress=quiet)
    assert isinstance(reference, LanguageReference)
    frozen, accounts = freeze_contexts(source, dynamic, source.contexts, {}, None, lambda: None)
    parameters = wholes(dynamic, frozen, accounts)
    with BundleWriter(folder / "model.cpc") as writer:
        metadata = export_engines(writer, dynamic, frozen, parameters, accounts, source, {}, CONFIG, lambda: None)
        with Search(
            writer.stage("search"), frozen, parameters, reference, metadata, CONFIG, validation, quiet
        ) as search:
            yield search


def be_own_baseline(model: Path, seed: int) -> None:
    """Make the model in the file `model` its own dense baseline, with held-out text that it writes."""
    checkpoint, dense = load_checkpoint(model), load_checkpoint(dense_path(model))
    baseline = replace(dense, state={name: checkpoint.state[name] for name in dense.state})
    held_out = {c: written(baseline.model, seed + 1000 * number) for number, c in enumerate(checkpoint.contexts)}
    save_checkpoint(replace(baseline, held_out=held_out), dense_path(model))
    gates = {name: torch.ones_like(checkpoint.state[name]) for name in checkpoint.state.keys() - dense.state.keys()}
    save_checkpoint(replace(checkpoint, state={**checkpoint.state, **gates}, held_out=held_out), model)


def written(model: LanguageModel, seed: int) -> np.ndarray:
    """Text that `model` samples, WINDOWS of LENGTH tokens."""
    generator, caches = torch.Generator().manual_seed(seed), model.caches()
    assert caches is not None
    ids = torch.randint(model.config.vocabulary, (WINDOWS, 1), generator=generator)
    past: Sequence[KeysValues] = [(torch.zeros(WINDOWS, each.heads, 0, each.head_dim),) * 2 for each in caches]
    with torch.inference_mode():
        for tokens in range(1, LENGTH + 1):
            mask, positions = torch.ones(WINDOWS, tokens, dtype=torch.int64), torch.full((WINDOWS, 1), tokens - 1)
            logits, past = model.decode(ids[:, -1:], mask, positions, torch.tensor(1), past)
            ids = torch.cat([ids, torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)], dim=1)
    return ids[:, :LENGTH].flatten().numpy().astype(np.int32)


def measure(model: Path) -> dict[str, Any]:
    """Search for the best precision of `model` under a budget that excludes some, and time all candidates again."""
    source = open_source(model)
    dynamic = source.capture(opset=CONFIG.opset)
    with searching(source, dynamic, LOOSE, model.parent, rounds=2) as search:
        exact, few = search.best(("int4-weights",)).record.candidates
    assert abs(exact.increase) < 1e-5, "float32 is the baseline"
    budget = max(few.increase, 0.0) / 3
    with searching(source, dynamic, budget, model.parent) as search:
        record = search.best(ROUNDED).record
        again = {name: relative for name, (_, relative) in search.latencies().items()}
    allowed = [each.name for each in record.candidates if each.within_budget] or [record.chosen]
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


def known(name: str, steps: int) -> list[dict[str, Any]]:
    """The rows that an earlier run with as many steps on the same kind of machine left in the file of results."""
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = found.get("steps") == steps and found["environment"]["cpu"] == environment().cpu
    rows: list[dict[str, Any]] = found["rows"] if same else []
    return rows


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path, exists=True), default="demo/corpus")
@click.option("--seeds", default=20)
@click.option("--first", default=0, help="The first seed; what the file of results has of others is kept.")
@click.option("--steps", default=60)
@click.option("--name", default="search", help="Name of the file of results.")
def main(corpus: Path, seeds: int, first: int, steps: int, name: str) -> None:
    config, rows = preset("tiny"), known(name, steps)
    first_two = sorted(path for path in corpus.iterdir() if path.is_dir())[:2]
    table = Table(title=f"--target best on {seeds} models of preset tiny")
    for column in ("seed", "budget", "chosen", "on other text", "budget kept", "slower than the fastest"):
        table.add_column(column, justify="right")
    for seed in range(first, first + seeds):
        training = TrainConfig(seed=seed, steps=steps, budgets=WHOLE, core_fractions=WHOLE)
        with tempfile.TemporaryDirectory() as folder:
            for context in first_two:
                shutil.copytree(context, Path(folder) / "corpus" / context.name)
            text = load_corpus(
                Path(folder) / "corpus",
                vocabulary=config.vocabulary,
                sequence=training.sequence,
                held_out_fraction=training.held_out_fraction,
                seed=seed,
            )
            model = Path(folder) / "model.pt"
            train(text, config, training, model)
            be_own_baseline(model, seed)
            row = measure(model)
        rows = sorted([*(each for each in rows if each["seed"] != seed), {"seed": seed, **row}], key=itemgetter("seed"))
        other = f"{row['other_increase']:+.2%} ± {CONFIDENCE * row['other_increase_error']:.2%}"
        kept = "yes" if holds(row, 0) else "within the error" if holds(row, CONFIDENCE) else "no"
        cells = [str(seed), f"{row['budget']:.2%}", row["chosen"], other, kept, f"{row['slower_than_the_fastest']:.1%}"]
        table.add_row(*cells)
        print(*cells, flush=True)
        save(name, {"steps": steps, "rows": rows})  # an interruption keeps what is done
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

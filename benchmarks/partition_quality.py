"""Quality of the partitioned model compared with the dense baseline and the controls, over several seeds.

    python benchmarks/partition_quality.py demo/corpus

Every seed draws new weights, held-out documents and batches, and trains the settings of the demo with controls. Within
a seed all branches see the same tokens. Perplexity is the geometric mean over contexts, relative to the dense
baseline of the same seed. About a quarter of an hour per seed on two cores.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import defaultdict
from pathlib import Path

import click
from common import save
from rich.console import Console
from rich.table import Table

from cpcompile.cli.demo import TRAIN
from cpcompile.core.config import preset
from cpcompile.pipeline.train import train_from_data
from cpcompile.report import mean_perplexity
from cpcompile.training.branch import StepReport

CONTROLS = ("one-mask", "random-per-context", "dense-distilled")


def train_once(corpus: Path, seed: int, console: Console) -> dict[str, float]:
    """The mean held-out perplexity of every branch for one seed."""

    def observe(report: StepReport) -> None:
        if report.perplexity:
            console.log(f"seed {seed} {report.branch} step {report.step} of {report.last}")

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = train_from_data(
            corpus,
            Path(folder) / "model.pt",
            preset("tiny"),
            dataclasses.replace(TRAIN, seed=seed, controls=CONTROLS),
            tokenizer=None,
            text_field="text",
            cache=Path(folder) / "cache",
            resume=False,
            held_out=False,
            progress=lambda *_: None,
            observer=observe,
        )
    training = checkpoint.training
    branches = training["perplexity"] | {name: c["perplexity"] for name, c in training["controls"].items()}
    return {name: mean_perplexity(list(perplexity.values())) for name, perplexity in branches.items()}


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path), default="demo/corpus")
@click.option("--seeds", default=3)
def main(corpus: Path, seeds: int) -> None:
    console = Console()
    runs = [train_once(corpus, seed, console) for seed in range(seeds)]
    relative = defaultdict(list)
    for run in runs:
        for name, perplexity in run.items():
            relative[name].append(perplexity / run["dense-baseline"])
    table = Table(title="mean perplexity, relative to the dense baseline of the same seed")
    for column in ("branch", "mean", *(f"seed {seed}" for seed in range(seeds))):
        table.add_column(column)
    for name, values in sorted(relative.items(), key=lambda row: sum(row[1])):
        table.add_row(name, *(f"{value - 1:+.1%}" for value in (sum(values) / seeds, *values)))
    console.print(table)
    save("partition_quality", {"steps": TRAIN.steps, "perplexity": runs, "relative": dict(relative)})


if __name__ == "__main__":
    main()

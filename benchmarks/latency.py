"""Latency of a context's engine compared with what a user would run instead, interleaved in one process.

    python benchmarks/latency.py demo/model.pt demo/model.cpc

The peers are the eager dense baseline and those of `cpcompile validate --peers all`. The limit is the ratio of
multiply-adds in matrix products at batch 1.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import click
import torch
from common import save
from rich.console import Console
from rich.table import Table

from cpcompile.bundle.reader import open_bundle
from cpcompile.core.config import ValidateConfig
from cpcompile.frontend.source import open_source
from cpcompile.validation.expected_graphs import FreshGraphs
from cpcompile.validation.open_reference import open_reference
from cpcompile.validation.peers import open_peers
from cpcompile.validation.runners import engine_runner
from cpcompile.validation.speed import measure_speed


def matrix_work(parameters: dict[str, list[int]], which: int) -> int:
    """Elements of the matrices that every token is multiplied by: [total, kept][which]."""
    return sum(sizes[which] for name, sizes in parameters.items() if "norm" not in name)


@click.command()
@click.argument("model", type=click.Path(path_type=Path), default="demo/model.pt")
@click.argument("bundle", type=click.Path(path_type=Path), default="demo/model.cpc")
@click.option("--rounds", default=60)
def main(model: Path, bundle: Path, rounds: int) -> None:
    opened, source, config = open_bundle(bundle), open_source(model), ValidateConfig(peers=("all",))
    reference = open_reference(source, config, data=None, trimmed={}, progress=lambda *_: None)
    variant, threads = opened.variants(opened.contexts[0])[0], torch.get_num_threads()
    graphs = FreshGraphs(source, lambda opset: source.capture(opset=opset), {})
    with open_peers(config, source, reference, graphs) as peers, ExitStack() as loaded:
        speed = measure_speed(
            loaded.enter_context(engine_runner(variant, threads=threads).load()),
            reference.dense(variant.context),
            reference.timed(variant.context),
            rounds=rounds,
            threads=threads,
            peers={peer.name: loaded.enter_context(peer.load()) for peer in peers(variant)},
        )
    assert speed.shapes is not None
    table = Table(title=f"p50 in ms of {variant.context}; in brackets: speedup over that peer")
    for column in ("batch x sequence", "engine", "eager", *speed.shapes[0].peers):
        table.add_column(column, justify="right")
    for shape in speed.shapes:
        cells = [(shape.eager_p50_ms, shape.ratio), *((peer.p50_ms, peer.ratio) for peer in shape.peers.values())]
        table.add_row(
            f"{shape.batch} x {shape.sequence}",
            f"{shape.p50_ms:.2f}",
            *(f"{ms:.2f} ({ratio:.2f}x)" for ms, ratio in cells),
        )
    by_name = opened.metadata["parameters"][variant.context]["by_name"]
    limit = matrix_work(by_name, 0) / matrix_work(by_name, 1)
    Console().print(table)
    print(f"limit by multiply-adds in matrix products: {limit:.2f}x")
    save("latency", {"context": variant.context, "speed": dataclasses.asdict(speed), "limit": limit})


if __name__ == "__main__":
    main()

"""Latency of a context's engine against what a user would run instead, interleaved in one process.

    python benchmarks/latency.py demo/model.pt demo/model.cpc

Peers: the eager dense baseline, the same compiled by torch.compile, the dense baseline as one ONNX
graph in ONNX Runtime. The limit is the ratio of multiply-adds in matrix products at batch 1.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from common import save, settled, spread
from rich.console import Console
from rich.table import Table

from cpcompile.bundle import open_bundle
from cpcompile.capture import capture_dense
from cpcompile.checkpoint import load_checkpoint
from cpcompile.models.decoder import Decoder
from cpcompile.runtime import Engine, create_session, session_options
from cpcompile.training.trainer import dense_path
from cpcompile.validation.runners import NO_SPINNING_AFTER_RUN

SHAPES = ((1, 128), (1, 1), (4, 128))


def dense_session(model: Decoder, folder: Path) -> ort.InferenceSession:
    path = folder / "dense.onnx"
    ir.save(capture_dense(model), path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for key, value in NO_SPINNING_AFTER_RUN.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(path, options)


def matrix_work(parameters: dict[str, list[int]], which: int) -> int:
    """Elements of the matrices that every token is multiplied with: [total, kept][which]."""
    return sum(sizes[which] for name, sizes in parameters.items() if "norm" not in name)


@click.command()
@click.argument("model", type=click.Path(path_type=Path), default="demo/model.pt")
@click.argument("bundle", type=click.Path(path_type=Path), default="demo/model.cpc")
@click.option("--rounds", default=60)
def main(model: Path, bundle: Path, rounds: int) -> None:
    opened, dense = open_bundle(bundle), load_checkpoint(dense_path(model)).model
    variant = opened.variants(opened.contexts[0])[0]
    options = session_options(variant, threads=torch.get_num_threads())
    for key, value in NO_SPINNING_AFTER_RUN.items():
        options.add_session_config_entry(key, value)
    engine = Engine(variant, create_session(variant, options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(dense, dynamic=True)
    generator = np.random.default_rng(0)
    result = {}
    table = Table(title=f"p50 in ms of {variant.context}; in brackets: times as fast as that peer")
    for column in ("batch x sequence", "engine", "eager dense", "torch.compile dense", "ONNX Runtime dense"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        session = dense_session(dense, Path(folder))
        for batch, sequence in SHAPES:
            ids = generator.integers(0, dense.config.vocabulary, (batch, sequence))
            tensor = torch.from_numpy(ids)
            sides: dict[str, Callable[[], object]] = {
                "engine": lambda ids=ids: engine.run(ids),
                "eager": lambda tensor=tensor: dense(tensor),
                "compile": lambda tensor=tensor: compiled(tensor),
                "onnxruntime": lambda ids=ids: session.run(["logits"], {"input_ids": ids}),
            }
            seconds = settled(sides, rounds)
            row = {name: spread([1000 * s for s in values]) for name, values in seconds.items()}
            ratios = {name: row[name]["median"] / row["engine"]["median"] for name in row if name != "engine"}
            result[f"{batch}x{sequence}"] = {"milliseconds": row, "ratios": ratios}
            cells = [f"{row[n]['median']:.2f} ({r:.2f}x)" for n, r in ratios.items()]
            table.add_row(f"{batch} x {sequence}", f"{row['engine']['median']:.2f}", *cells)
    by_name = opened.metadata["parameters"][variant.context]["by_name"]
    limit = matrix_work(by_name, 0) / matrix_work(by_name, 1)
    Console().print(table)
    print(f"limit by multiply-adds in matrix products: {limit:.2f}x")
    save("latency", {"context": variant.context, "shapes": result, "limit": limit})


if __name__ == "__main__":
    main()

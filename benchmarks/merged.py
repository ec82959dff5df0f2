"""Compare one engine for all contexts with one engine per context and the dense model: memory and latency.

    cpcompile build demo/model.pt -o demo/merged.cpc --merged
    python benchmarks/merged.py demo/model.pt demo/merged.cpc

Memory is the peak RSS of running at 1 x 128, each side in a fresh process. Latency is interleaved in one process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from common import save, spread, time_sides
from rich.console import Console
from rich.table import Table

from cpcompile.bundle.reader import Variant, open_bundle
from cpcompile.core.paths import dense_path
from cpcompile.frontend.capture import capture_dense
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.machine.environment import available_cores
from cpcompile.machine.subprocesses import in_fresh_process
from cpcompile.runtime.engine import Engine, create_session, session_options
from cpcompile.validation.runners import NO_SPINNING_AFTER_RUN
from cpcompile.validation.speed import ratio_interval

SHAPES = ((1, 1), (1, 128), (4, 128))
BUNDLE_SIDE = """
import json, sys
from pathlib import Path
import numpy as np
from cpcompile.bundle import open_bundle
from cpcompile.machine.memory import peak_resident_bytes
from cpcompile.runtime import Engine, load_engine
bundle, variant, *contexts = sys.argv[1:]
opened = open_bundle(Path(bundle))
sessions, engines = {}, []
for context in contexts:
    chosen = opened.variant(context, variant)
    if chosen.model not in sessions:  # the merged engine is loaded once
        sessions[chosen.model] = load_engine(opened, context, variant).session
    engines.append(Engine(chosen, sessions[chosen.model]))
for engine in engines * 3:
    engine.run(np.zeros((1, 128), np.int64))
print(json.dumps(peak_resident_bytes()))
"""
FILE_SIDE = """
import json, sys
import numpy as np, onnxruntime as ort
from cpcompile.machine.memory import peak_resident_bytes
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for _ in range(3):
    session.run(None, {"input_ids": np.zeros((1, 128), np.int64)})
print(json.dumps(peak_resident_bytes()))
"""


def peak_of(code: str, *arguments: object) -> int:
    peak: int = in_fresh_process("-c", code, *map(str, arguments))
    return peak


def open_engine(variant: Variant) -> Engine:
    options = session_options(variant, threads=available_cores())
    for key, value in NO_SPINNING_AFTER_RUN.items():
        options.add_session_config_entry(key, value)
    return Engine(variant, create_session(variant, options))


@click.command()
@click.argument("model", type=click.Path(path_type=Path), default="demo/model.pt")
@click.argument("bundle", type=click.Path(path_type=Path), default="demo/merged.cpc")
@click.option("--rounds", default=60)
def main(model: Path, bundle: Path, rounds: int) -> None:
    opened = open_bundle(bundle)
    contexts = opened.contexts
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        ir.save(capture_dense(load_checkpoint(dense_path(model)).model), dense)
        peaks = {
            "one context": peak_of(BUNDLE_SIDE, bundle, "cpu-fp32", contexts[0]),
            f"{len(contexts)} engines": peak_of(BUNDLE_SIDE, bundle, "cpu-fp32", *contexts),
            "merged": peak_of(BUNDLE_SIDE, bundle, "cpu-fp32-merged", *contexts),
            "dense ONNX Runtime": peak_of(FILE_SIDE, dense),
        }
    single, merged = (open_engine(opened.variant(contexts[-1], name)) for name in ("cpu-fp32", "cpu-fp32-merged"))
    generator = np.random.default_rng(0)
    latency = {}
    table = Table(title=f"p50 in ms, {contexts[-1]}")
    for column in ("batch x sequence", "one context", "merged", "merged / one"):
        table.add_column(column, justify="right")
    for batch, sequence in SHAPES:
        ids = generator.integers(0, 512, (batch, sequence))
        sides = {"single": lambda ids=ids: single.run(ids), "merged": lambda ids=ids: merged.run(ids)}
        seconds = time_sides(sides, rounds=rounds)
        row = {name: spread(1000 * values) for name, values in seconds.items()}
        ratio, low, high = ratio_interval(seconds["merged"], seconds["single"], seed=0)
        latency[f"{batch}x{sequence}"] = {"milliseconds": row, "ratio": ratio, "ratio_low": low, "ratio_high": high}
        medians = (f"{each['median']:.2f}" for each in row.values())
        table.add_row(f"{batch} x {sequence}", *medians, f"{ratio:.2f} ({low:.2f} to {high:.2f})")
    Console().print(table)
    Console().print(", ".join(f"{name} {peak / 1e6:.1f} MB" for name, peak in peaks.items()))
    save("merged", {"peak_rss_bytes": peaks, "latency": latency, "contexts": list(contexts)})


if __name__ == "__main__":
    main()

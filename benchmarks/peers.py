"""Every engine of a context beside everything that a user would run instead, in one run.

    python benchmarks/peers.py demo/model.pt demo/model.cpc
    python benchmarks/peers.py smollm2.pt smollm2.cpc --gguf SmolLM2-135M-Instruct.Q4_1.gguf

The bundle is one that `cpcompile build --target cpu --precision int8,int7,int8-weights,int4-weights` made; it may have
trimmed vocabularies. The peers compute the dense baseline:

    eager, torch.compile          PyTorch in float32
    ORT fp32                      a plain export in ONNX Runtime
    ORT int8                      `quantize_dynamic` of ONNX Runtime, per channel: weights and inputs of products
    ORT int8, exact               the same with `session.x64quantprecision`; without, sums overflow on x64 before VNNI
    ORT int8/int4 weights         MatMulNBits of ONNX Runtime, blocks of 32, accuracy level 4
    OpenVINO fp32, bf16           the plain export in OpenVINO
    OpenVINO int8/int4 weights    the files with MatMulNBits in OpenVINO, which keeps the weights as they are
    llama.cpp                     with --gguf, which names the same model: as the file has it, and in float32

Shapes are batch x sequence; 1 x 1 follows 256 tokens in a cache. An engine is compared with the fastest dense peer
whose perplexity on held-out text is at most 1 % above its own, or above that of the best dense peer. Sides are
interleaved, each after a rest; figures are medians. A chart of quality against latency at 1 x 128 goes beside the
results.
The limit is the ratio of multiply-adds. GEMM is the share of the multiply-adds per second that one large product of
the same kind reaches here: of float32 for fp32, of 8-bit integers for int8.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort
import torch
from common import RESULTS, save, spread, time_sides
from dense_peers import SHAPES, Shape, Side, Sides, dense_sides, session_side
from latency import matrix_work
from llama_models import require_llama_cpp
from quality_chart import Point, write_chart
from rich.console import Console
from rich.table import Table

from cpcompile.bundle.reader import Bundle, open_bundle
from cpcompile.core.cache import OUTPUT
from cpcompile.core.config import ValidateConfig
from cpcompile.core.measured import NotMeasured
from cpcompile.core.paths import dense_path
from cpcompile.core.types import Feeds
from cpcompile.exporters.onnxruntime_exporter import EXACT_PRODUCTS
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.frontend.source import TrainedSource, open_source
from cpcompile.machine.environment import available_cores
from cpcompile.pipeline.references import trimmed_vocabularies
from cpcompile.runtime.engine import create_session, session_options
from cpcompile.validation.open_reference import open_reference
from cpcompile.validation.reference import Outputs, Reference, Run
from cpcompile.validation.runners import NO_SPINNING_AFTER_RUN

LABELS = {s: f"{s[0]} x {s[1]}" + (f" after {s[2]}" if s[2] else "") for s in SHAPES}
CHARTED: Shape = (1, 128, 0)
AS_GOOD = 1.01
REST_SECONDS = 0.06
MEMORY = (
    "import sys; import onnxruntime as ort, numpy as np; from cpcompile.core.cache import complete;"
    "from cpcompile.machine.procfs import status_bytes; o = ort.SessionOptions(); o.log_severity_level = 3;"
    "o.intra_op_num_threads = int(sys.argv[2]); o.add_session_config_entry('session.x64quantprecision', '1');"
    "[o.add_session_config_entry('session.model_external_initializers_file_folder_path', w) for w in sys.argv[3:]];"
    "s = ort.InferenceSession(sys.argv[1], o, providers=['CPUExecutionProvider']);"
    "f = complete({'input_ids': np.zeros((1, 128), np.int64)}, {i.name: i.shape for i in s.get_inputs()});"
    "s.run(['logits'], f);"
    "print(status_bytes('VmHWM'))"
)
"""A fresh process that loads a graph, runs it and prints the most memory that it had."""


def engine_sides(bundle: Bundle, context: str, threads: int) -> Sides:
    """The engines of the context for the CPU."""
    sides = Sides()
    for variant in bundle.variants(context):
        if variant.provider == "CPUExecutionProvider" and not variant.feeds and not variant.plan:
            options = session_options(variant, threads=threads)
            for key, value in NO_SPINNING_AFTER_RUN.items():
                options.add_session_config_entry(key, value)
            session = create_session(variant, options)
            sides[variant.name] = session_side(session, ours=True, graph=variant.model, weights=variant.weights)
    return sides


def gemm_peaks(threads: int) -> dict[str, float]:
    """Multiply-adds per second of one large product, by the kind of its operands."""
    rng = np.random.default_rng(0)
    rows, inner, columns = 512, 1024, 4096
    weight = rng.standard_normal((inner, columns), dtype=np.float32)
    peaks = {}
    nodes = {
        "fp32": [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "int8": [
            onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            onnx.helper.make_node("MatMulInteger", ["q", "w", "z"], ["y"]),
        ],
    }
    for kind, graph in nodes.items():
        constant = weight if kind == "fp32" else rng.integers(-127, 128, weight.shape).astype(np.int8)
        whole = onnx.helper.make_graph(
            graph,
            "product",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (rows, inner))],
            [onnx.helper.make_empty_tensor_value_info("y")],
            [onnx.numpy_helper.from_array(constant, "w")],
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        for key, value in EXACT_PRODUCTS.items():
            options.add_session_config_entry(key, value)
        model = onnx.helper.make_model(whole, opset_imports=[onnx.helper.make_opsetid("", 21)])
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        x = {"x": rng.standard_normal((rows, inner), dtype=np.float32)}
        seconds = time_sides({kind: lambda session=session, x=x: session.run(None, x)}, rounds=20)[kind]
        peaks[kind] = rows * inner * columns / float(np.median(seconds))
    return peaks


def memory_of(side: Side, threads: int) -> int | None:
    """The most memory that a fresh process has that runs it at 1 x 128."""
    if side.graph is None:
        return None
    command = [
        sys.executable,
        "-c",
        MEMORY,
        str(side.graph),
        str(threads),
        *([str(side.weights)] if side.weights else []),
    ]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def as_run(side: Side) -> Run:
    def run(feeds: Feeds) -> Outputs:
        return {OUTPUT: side.run(feeds)}

    return run


def best_peer(name: str, times: Mapping[str, float], sides: Mapping[str, Side], quality: Mapping[str, float]) -> str:
    """The fastest dense peer whose perplexity is at most AS_GOOD times that of `name`, or of the best of them."""
    dense = [each for each in times if not sides[each].ours]
    largest = AS_GOOD * max(quality[name], min(quality[each] for each in dense))
    return min((each for each in dense if quality[each] <= largest), key=lambda each: times[each])


def time_shapes(sides: Mapping[str, Side], rounds: int) -> dict[Shape, dict[str, dict[str, float]]]:
    """Milliseconds by shape and side."""
    found = {}
    for shape in SHAPES:
        start = time.perf_counter()
        runs = {key: partial(side.run, side.feeds[shape]) for key, side in sides.items() if shape in side.feeds}
        seconds = time_sides(runs, rounds=rounds, settle=REST_SECONDS)
        found[shape] = {key: spread(1000 * values) for key, values in seconds.items()}
        print(f"{LABELS[shape]}: timed {len(runs)} sides in {time.perf_counter() - start:.0f} s", flush=True)
    return found


def perplexity_of(name: str, side: Side, reference: Reference, context: str) -> float:
    """On the held-out text of `context`."""
    perplexity = float(reference.quality(context, as_run(side)).perplexity)
    print(f"{name}: perplexity {perplexity:.2f}", flush=True)
    return perplexity


def print_table(title: str, result: Mapping[str, Any], peaks: Mapping[str, float]) -> None:
    """One row for each side."""
    table = Table(title=title)
    for column in ("", *LABELS.values(), "GEMM", "perplexity", "MB", "RSS in MB"):
        table.add_column(column, justify="right" if column else "left")
    for key, side in result.items():
        times, against = side["milliseconds"], side["best_dense_peer"]
        cells = []
        for label in LABELS.values():
            ratio = ""
            if (best := against.get(label)) is not None:
                peer = result[best]["milliseconds"][label]["median"]
                ratio = f" ({peer / times[label]['median']:.2f}x)"
            cells.append(f"{times[label]['median']:.2f}{ratio}" if label in times else "")
        share, size, most = side["gemm_share"], side["bytes"], side["peak_rss_bytes"]
        table.add_row(
            key,
            *cells,
            f"{share:.0%}" if share else "",
            f"{side['perplexity']:.2f}",
            f"{size / 1e6:.1f}" if size else "",
            f"{most / 1e6:.0f}" if most else "",
        )
    Console(width=200).print(table)
    print("one large product: ", end="")
    print(", ".join(f"{2 * peak / 1e9:.0f} GFLOP/s in {kind}" for kind, peak in peaks.items()))


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default="demo/model.pt")
@click.argument("bundle", type=click.Path(path_type=Path, exists=True), default="demo/model.cpc")
@click.option("--context", help="The context.  [default: the first]")
@click.option("--gguf", type=click.Path(path_type=Path, exists=True), help="The same model for llama.cpp.")
@click.option("--rounds", default=20)
@click.option("--tokens", type=int, help="Held-out tokens that perplexities are measured on.  [default: all]")
@click.option("--name", default="peers", help="Name of the files of results.")
def main(
    model: Path, bundle: Path, context: str | None, gguf: Path | None, rounds: int, tokens: int | None, name: str
) -> None:
    if gguf is not None:
        require_llama_cpp()
    opened, threads = open_bundle(bundle), available_cores()
    context = context or opened.contexts[0]
    torch.set_num_threads(threads)
    dense, source = load_checkpoint(dense_path(model)).model, open_source(model)
    assert isinstance(source, TrainedSource)
    if tokens is not None:
        held_out = {name: ids[: tokens + 1] for name, ids in source.checkpoint.held_out.items()}
        source.checkpoint = replace(source.checkpoint, held_out=held_out)
    config = ValidateConfig(coherence=False)
    whole = open_reference(source, config, data=None, trimmed={}, progress=lambda *_: None)
    own = open_reference(source, config, data=None, trimmed=trimmed_vocabularies(opened), progress=lambda *_: None)
    by_name = opened.metadata["parameters"][context]["by_name"]
    work = [matrix_work(by_name, which) for which in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        wanted = engine_sides(opened, context, threads) | dense_sides(dense, gguf, Path(folder), threads)
        sides = {key: side for key, side in wanted.items() if isinstance(side, Side)}
        quality = {key: perplexity_of(key, side, own if side.ours else whole, context) for key, side in sides.items()}
        peaks = gemm_peaks(threads)
        times = time_shapes(sides, rounds)
        memory = {key: memory_of(side, threads) for key, side in sides.items()}
        sizes = {key: side.bytes() for key, side in sides.items()}
    medians = {shape: {key: each["median"] for key, each in row.items()} for shape, row in times.items()}
    result = {}
    for key, side in sides.items():
        kind = next((kind for kind in peaks if key in (f"cpu-{kind}", f"ORT {kind}", f"ORT {kind}, exact")), None)
        rate = 1000 * work[1 if side.ours else 0] * 128 / medians[CHARTED][key]
        best = {LABELS[s]: best_peer(key, medians[s], sides, quality) for s in SHAPES if side.ours}
        result[key] = {
            "milliseconds": {LABELS[shape]: row[key] for shape, row in times.items() if key in row},
            "best_dense_peer": best,
            "perplexity": quality[key],
            "bytes": sizes[key],
            "peak_rss_bytes": memory[key],
            "gemm_share": rate / peaks[kind] if kind else None,
        }
    title = f"{context}, {threads} threads: median ms; in brackets: speedup over the best dense peer as good"
    print_table(title, result, peaks)
    limit = work[0] / work[1]
    print(f"limit by multiply-adds: {limit:.2f}x")
    not_run = {key: side.reason for key, side in wanted.items() if isinstance(side, NotMeasured)}
    for key, reason in not_run.items():
        print(f"{key} was not run: {reason}")
    facts = {"context": context, "threads": threads, "limit": limit, "peaks": peaks}
    save(name, {**facts, "sides": result, "not_run": not_run})
    points = [Point(key, medians[CHARTED][key], quality[key], side.ours) for key, side in sides.items()]
    write_chart(RESULTS / f"{name}.svg", points, f"{context}: one prompt of 128 tokens, {threads} threads")


if __name__ == "__main__":
    main()

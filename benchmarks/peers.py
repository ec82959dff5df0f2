"""Every engine of a context beside everything that a user would run instead, in one run.

    python benchmarks/peers.py demo/model.pt demo/model.cpc

The bundle is one that `cpcompile build --target cpu --precision int8,int8-weights,int4-weights` made. The peers compute
the dense baseline:

    eager, torch.compile        PyTorch in float32
    ORT fp32                    a plain export in ONNX Runtime
    ORT int8                    `quantize_dynamic` of ONNX Runtime, per channel: weights and inputs of products
    ORT int8, exact             the same with `session.x64quantprecision`; without, sums overflow on x64 before VNNI
    ORT int8/int4 weights       MatMulNBits of ONNX Runtime, blocks of 32, accuracy level 4
    OpenVINO fp32, bf16         the same export in OpenVINO, where that is installed

Shapes are batch x sequence; 1 x 1 follows 256 tokens in a cache. An engine is compared with the fastest dense peer
whose perplexity on held-out text is at most 1 % above its own. Sides are interleaved, each after a rest; figures are
medians.
The limit is the ratio of multiply-adds. GEMM is the share of the multiply-adds per second that one large product of
the same kind reaches here: of float32 for fp32, of 8-bit integers for int8.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from common import save, spread, time_sides
from latency import matrix_work
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from rich.console import Console
from rich.table import Table

from cpcompile.bundle.reader import Bundle, open_bundle
from cpcompile.core.cache import INPUT, OUTPUT, PAST, complete
from cpcompile.core.config import ValidateConfig
from cpcompile.core.paths import dense_path
from cpcompile.core.types import Feeds
from cpcompile.exporters.onnxruntime_exporter import EXACT_PRODUCTS
from cpcompile.frontend.capture import capture_dense
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.frontend.source import open_source
from cpcompile.machine.environment import available_cores
from cpcompile.models.language_model import LanguageModel
from cpcompile.runtime.engine import create_session, session_options
from cpcompile.validation.open_reference import open_reference
from cpcompile.validation.reference import Outputs, Run
from cpcompile.validation.runners import NO_SPINNING_AFTER_RUN

SHAPES = ((1, 1, 256), (1, 16, 0), (1, 128, 0), (1, 512, 0), (4, 128, 0))
"""Batch, tokens, tokens in the cache."""
AS_GOOD = 1.01
REST_SECONDS = 0.06
BLOCK = 32
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


@dataclass(frozen=True)
class Side:
    """Something that gives the logits of tokens. graph, weights: its files, where it has some."""

    run: Callable[[Feeds], Any]
    ours: bool = False
    cached: bool = True
    graph: Path | None = None
    weights: Path | None = None
    feeds: Mapping[tuple[int, int, int], Feeds] = field(default_factory=dict)

    def bytes(self) -> int | None:
        """The size of its files."""
        if self.graph is None:
            return None
        data = [self.graph.with_name(f"{self.graph.name}.data"), *(self.weights.iterdir() if self.weights else ())]
        return self.graph.stat().st_size + sum(path.stat().st_size for path in data if path.exists())


def session_side(session: Any, **options: Any) -> Side:
    """A graph in ONNX Runtime."""
    shapes = {each.name: each.shape for each in session.get_inputs()}
    feeds = {shape: feeds_of(shapes, *shape) for shape in SHAPES}
    return Side(lambda given: session.run([OUTPUT], complete(given, shapes))[0], feeds=feeds, **options)


def feeds_of(shapes: Mapping[str, Any], batch: int, tokens: int, past: int) -> Feeds:
    """Tokens that follow `past` others."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {INPUT: rng.integers(0, 256, (batch, tokens))}
    for name, shape in shapes.items() if past else ():
        if PAST.fullmatch(name):
            feeds[name] = rng.standard_normal((batch, shape[1], past, shape[3]), dtype=np.float32)
    return feeds


def onnx_session(path: Path, threads: int, extra: Mapping[str, str] = {}) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for key, value in {**NO_SPINNING_AFTER_RUN, **extra}.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def engine_sides(bundle: Bundle, context: str, threads: int) -> dict[str, Side]:
    """The engines of the context for the CPU."""
    sides = {}
    for variant in bundle.variants(context):
        if variant.provider == "CPUExecutionProvider" and not variant.feeds and not variant.plan:
            options = session_options(variant, threads=threads)
            for key, value in NO_SPINNING_AFTER_RUN.items():
                options.add_session_config_entry(key, value)
            session = create_session(variant, options)
            sides[variant.name] = session_side(session, ours=True, graph=variant.model, weights=variant.weights)
    return sides


def torch_sides(model: LanguageModel) -> dict[str, Side]:
    """The dense model in torch, with a cache of its own where there is one to follow."""
    caches = model.caches()
    assert caches is not None
    rng = np.random.default_rng(0)
    feeds: dict[tuple[int, int, int], Feeds] = {}
    past = {}
    for batch, tokens, length in SHAPES:
        feeds[batch, tokens, length] = {INPUT: rng.integers(0, 256, (batch, tokens))}
        zeros = [torch.zeros(batch, each.heads, length, each.head_dim) for each in caches]
        past[batch, tokens] = [(zero, zero) for zero in zeros] if length else None

    def eager(given: Feeds) -> np.ndarray:
        ids = torch.from_numpy(given[INPUT])
        with torch.inference_mode():
            if (known := past.get(tuple(ids.shape))) is None:
                return model(ids, None).numpy()
            length = known[0][0].shape[2]
            mask = torch.ones((ids.shape[0], length + ids.shape[1]), dtype=torch.int64)
            positions = torch.arange(length, length + ids.shape[1])[None]
            return model.decode(ids, mask, positions, torch.tensor(0), known)[0].numpy()

    compiled = torch.compile(model, dynamic=True)

    def fast(given: Feeds) -> np.ndarray:
        with torch.inference_mode():
            return compiled(torch.from_numpy(given[INPUT]), None).numpy()

    return {"eager": Side(eager, feeds=feeds), "torch.compile": Side(fast, cached=False, feeds=feeds)}


def dense_sides(model: LanguageModel, folder: Path, threads: int) -> dict[str, Side]:
    """The dense model in ONNX Runtime: as it is exported, and quantised in the ways that it offers."""
    exported, folded = folder / "exported.onnx", folder / "fp32.onnx"
    ir.save(capture_dense(model, cached=True), exported, external_data="exported.onnx.data")
    # Quantisers find only products with weights, not with transposed ones: constants have to be folded first.
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    ort.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    paths = {"ORT fp32": folded, "ORT int8": folder / "int8.onnx"}
    quantize_dynamic(
        folded,
        paths["ORT int8"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gather"],  # it takes the standard's Attention for another operator
    )
    for bits in (8, 4):
        quantizer = MatMulNBitsQuantizer(
            onnx.load(folded), bits=bits, block_size=BLOCK, is_symmetric=True, accuracy_level=4
        )
        quantizer.process()
        name = f"ORT int{bits} weights"
        paths[name] = folder / f"int{bits}-weights.onnx"
        quantizer.model.save_model_to_file(str(paths[name]))
    for name, path in paths.items():
        graph = onnx.load(path, load_external_data=False).graph
        if name != "ORT fp32" and not any(node.op_type in ("MatMulInteger", "MatMulNBits") for node in graph.node):
            raise click.ClickException(f"{name}: the quantiser found nothing")
    sides = {name: session_side(onnx_session(path, threads), graph=path) for name, path in paths.items()}
    exact = onnx_session(paths["ORT int8"], threads, EXACT_PRODUCTS)
    return sides | {"ORT int8, exact": session_side(exact, graph=paths["ORT int8"])}


def openvino_sides(path: Path, threads: int) -> dict[str, Side]:
    """The dense export in OpenVINO; nothing where that is not installed."""
    try:
        import openvino
    except ImportError:
        print("OpenVINO was not run: it is not installed")
        return {}
    core, sides = openvino.Core(), {}
    for precision in ("f32", "bf16"):
        if precision.upper() not in {"F32", *core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")}:
            print(f"OpenVINO {precision} was not run: this processor has no instructions for it")
            continue
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(str(path), "CPU", settings)
        shapes = {
            min(each.get_names()): [d.get_length() if d.is_static else None for d in each.get_partial_shape()]
            for each in compiled.inputs
        }
        request = compiled.create_infer_request()

        def run(given: Feeds, request: Any = request, shapes: Mapping[str, Any] = shapes) -> np.ndarray:
            found = request.infer(complete(given, shapes), share_inputs=True)
            return np.asarray(next(found[each] for each in found if OUTPUT in each.get_names()))

        feeds = {shape: feeds_of(shapes, *shape) for shape in SHAPES}
        sides[f"OpenVINO {precision.replace('f32', 'fp32')}"] = Side(run, feeds=feeds)
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
    """The fastest dense peer whose perplexity is at most AS_GOOD times that of `name`."""
    good = [each for each in times if not sides[each].ours and quality[each] <= AS_GOOD * quality[name]]
    return min(good, key=lambda each: times[each])


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default="demo/model.pt")
@click.argument("bundle", type=click.Path(path_type=Path, exists=True), default="demo/model.cpc")
@click.option("--context", help="The context.  [default: the first]")
@click.option("--rounds", default=20)
@click.option("--name", default="peers", help="Name of the file of results.")
def main(model: Path, bundle: Path, context: str | None, rounds: int, name: str) -> None:
    opened, threads = open_bundle(bundle), available_cores()
    context = context or opened.contexts[0]
    torch.set_num_threads(threads)
    dense, source = load_checkpoint(dense_path(model)).model, open_source(model)
    config = ValidateConfig(coherence=False)
    reference = open_reference(source, config, data=None, trimmed={}, progress=lambda *_: None)
    by_name = opened.metadata["parameters"][context]["by_name"]
    work = [matrix_work(by_name, which) for which in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        sides = engine_sides(opened, context, threads) | torch_sides(dense)
        sides |= dense_sides(dense, Path(folder), threads)
        sides |= openvino_sides(Path(folder) / "exported.onnx", threads)
        quality = {key: float(reference.quality(context, as_run(side)).perplexity) for key, side in sides.items()}
        peaks = gemm_peaks(threads)
        found = {}
        for shape in SHAPES:
            taken = {key: side for key, side in sides.items() if side.cached or not shape[2]}
            runs = {key: lambda side=side, shape=shape: side.run(side.feeds[shape]) for key, side in taken.items()}
            seconds = time_sides(runs, rounds=rounds, settle=REST_SECONDS)
            found[shape] = {key: spread(values) for key, values in seconds.items()}
        memory = {key: memory_of(side, threads) for key, side in sides.items()}
        sizes = {key: side.bytes() for key, side in sides.items()}
    labels = {s: f"{s[0]} x {s[1]}" + (f" after {s[2]}" if s[2] else "") for s in SHAPES}
    medians = {shape: {key: each["median"] for key, each in row.items()} for shape, row in found.items()}
    table = Table(
        title=f"{context}, {threads} threads: median ms; in brackets: speedup over the best dense peer as good"
    )
    for column in ("", *labels.values(), "GEMM", "perplexity", "MB", "RSS in MB"):
        table.add_column(column, justify="right" if column else "left")
    result = {}
    for key, side in sides.items():
        cells = []
        for shape in SHAPES:
            time = medians[shape].get(key)
            against = best_peer(key, medians[shape], sides, quality) if side.ours else None
            ratio = f" ({medians[shape][against] / time:.2f}x)" if against and time else ""
            cells.append("" if time is None else f"{1000 * time:.2f}{ratio}")
        kind = next((kind for kind in peaks if key in (f"cpu-{kind}", f"ORT {kind}", f"ORT {kind}, exact")), None)
        rate = work[1 if side.ours else 0] * 128 / medians[1, 128, 0][key]
        size, most = sizes[key], memory[key]
        result[key] = {
            "milliseconds": {labels[shape]: found[shape][key] for shape in SHAPES if key in found[shape]},
            "best_dense_peer": {labels[s]: best_peer(key, medians[s], sides, quality) for s in SHAPES if side.ours},
            "perplexity": quality[key],
            "bytes": size,
            "peak_rss_bytes": most,
            "gemm_share": rate / peaks[kind] if kind else None,
        }
        table.add_row(
            key,
            *cells,
            f"{rate / peaks[kind]:.0%}" if kind else "",
            f"{quality[key]:.2f}",
            f"{size / 1e6:.1f}" if size else "",
            f"{most / 1e6:.0f}" if most else "",
        )
    Console(width=200).print(table)
    print(f"limit by multiply-adds: {work[0] / work[1]:.2f}x; one large product: ", end="")
    print(", ".join(f"{2 * peak / 1e9:.0f} GFLOP/s in {kind}" for kind, peak in peaks.items()))
    save(name, {"context": context, "threads": threads, "limit": work[0] / work[1], "peaks": peaks, "sides": result})


if __name__ == "__main__":
    main()

"""What every pass over the graph of a CPU engine gains: the engine with all of them, and without each, side by side.

    python benchmarks/graph_passes.py demo/model.pt

Engines are built as `cpcompile build --target cpu --precision int8` does, from the calibration beside the model if
there is one: with all passes of `fused_for_cpu` and the tied head, then without one of them, and without any.
ShareWeights lets contexts store their weights once: without it, every engine has its own. 1 x 1 follows 256 tokens in
a cache, which is written in place where the engine can do that.

Sides are interleaved. Times are medians; the ratio is the time without the pass to the time with all of them in the
same round, its median and its quartiles: above 1, the pass gains. ONNX Runtime has passes of its own, so that it runs
fewer nodes than the file has.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from common import feeds_of, onnx_session, save, spread, time_sides
from rich.console import Console
from rich.table import Table

from cpcompile.bundle.reader import WEIGHTS_OPTION
from cpcompile.bundle.writer import BundleWriter
from cpcompile.core.cache import IN_PLACE, LENGTH, OUTPUT, PAST, complete, present_of
from cpcompile.core.config import BuildConfig
from cpcompile.core.types import Feeds
from cpcompile.exporters.onnxruntime_exporter import export_onnxruntime
from cpcompile.frontend.source import open_source
from cpcompile.machine.environment import available_cores
from cpcompile.passes.freeze import Frozen
from cpcompile.passes.share_weights import ShareWeights, Whole
from cpcompile.passes.tied_head import TiedHead
from cpcompile.pipeline.build import freeze_contexts
from cpcompile.pipeline.cpu_engines import FUSIONS, fused_for_cpu, rounded_graphs
from cpcompile.pipeline.stored_weights import NOT_STORED, Stored, store, wholes

SHAPES = {"1 x 1 after 256": (1, 1, 256), "1 x 128": (1, 128, 0), "4 x 128": (4, 128, 0)}
"""Batch, tokens, tokens in the cache."""
ALL, NONE = "all passes", "none of them"
TIED, SHARED = TiedHead.__name__, ShareWeights.__name__

Fusions = Sequence[ir.passes.InPlacePass]


@dataclass(frozen=True)
class Built:
    """An engine's graph and its file, with the options that it needs."""

    graph: ir.Model
    file: Path
    options: Mapping[str, str]


def without(left_out: str) -> Fusions:
    """The passes of `fused_for_cpu` but the one of that name."""
    return [] if left_out == NONE else [each for each in FUSIONS if type(each).__name__ != left_out]


def build_engines(
    frozen: Mapping[str, Frozen], parameters: Mapping[str, Whole], context: str, precision: str, writer: BundleWriter
) -> dict[str, Built]:
    """The engines of `context` by the pass that is left out."""
    schemes = {} if precision == "fp32" else dict.fromkeys(parameters, precision)
    files: dict[tuple[bool, bool], tuple[ir.Model, Stored]] = {}
    engines = {}
    for left_out in (ALL, *(type(each).__name__ for each in FUSIONS), TIED, SHARED, NONE):
        kind = tie, share = left_out not in (TIED, NONE), left_out != SHARED
        if kind not in files:
            graphs = rounded_graphs(frozen, parameters, schemes, precision, tie=tie)
            stored = store(writer, graphs.models, graphs.kept, graphs.whole) if share else NOT_STORED
            files[kind] = graphs.models[context], stored
        frozen_graph, stored = files[kind]
        graph = fused_for_cpu(frozen_graph, without(left_out))
        folder = writer.folder(context, f"{precision} without {left_out}")
        artifact = export_onnxruntime(
            graph, folder, weights=stored.file, locations=stored.locations, precision=precision
        )
        weights = {WEIGHTS_OPTION: str(stored.file.parent.resolve())} if stored.file else {}
        engines[left_out] = Built(graph, folder / artifact.model_file, {**artifact.session_options, **weights})
    return engines


def same_graph(one: ir.Model, other: ir.Model) -> bool:
    """Whether both have the same nodes, so that the pass that makes the difference had nothing to do."""
    first, second = (
        [(node.op_type, [v and v.name for v in node.inputs], [v.name for v in node.outputs]) for node in model.graph]
        for model in (one, other)
    )
    return first == second


def prompt_side(session: Any, feeds: Feeds) -> Callable[[], object]:
    """The logits of all tokens."""
    return lambda: session.run([OUTPUT], feeds)


def token_side(session: Any, feeds: Feeds) -> Callable[[], object]:
    """The logits of a token, and the cache with its keys and values, where the runtime has it."""
    binding = session.io_binding()
    binding.bind_output(OUTPUT)
    in_place = IN_PLACE in session.get_modelmeta().custom_metadata_map
    for name, array in feeds.items():
        if in_place and PAST.fullmatch(name):
            room = [(0, int(axis == LENGTH)) for axis in range(array.ndim)]
            buffer = ort.OrtValue.ortvalue_from_numpy(np.pad(array, room))
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(present_of(name), buffer)
            continue
        binding.bind_cpu_input(name, array)
        if (present := present_of(name)) is not None:
            binding.bind_output(present)
    return lambda: session.run_with_iobinding(binding)


def time_engines(engines: Mapping[str, Built], threads: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Times and ratios by pass left out and shape, and how many nodes run."""
    sessions = {name: onnx_session(each.file, threads, each.options) for name, each in engines.items()}
    inputs = {each.name: each.shape for each in sessions[ALL].get_inputs()}
    found: dict[str, dict[str, Any]] = {
        name: {"nodes": len(each.graph.graph), "nodes_run": nodes_run(each), "milliseconds": {}, "ratio": {}}
        for name, each in engines.items()
    }
    for shape, (batch, tokens, past) in SHAPES.items():
        feeds = complete(feeds_of(inputs, batch, tokens, past), inputs)
        side = token_side if past else prompt_side
        seconds = time_sides({name: side(each, feeds) for name, each in sessions.items()}, rounds=rounds)
        for name, times in seconds.items():
            found[name]["milliseconds"][shape] = spread(1000 * times)
            found[name]["ratio"][shape] = spread(times / seconds[ALL])
    return found


def nodes_run(engine: Built) -> int:
    """How many nodes are left of the graph after the passes of ONNX Runtime, in a profiled run of one token."""
    session = onnx_session(engine.file, 1, engine.options, profile=engine.file.parent / "profile")
    inputs = {each.name: each.shape for each in session.get_inputs()}
    session.run([OUTPUT], complete(feeds_of(inputs, 1, 1, 0), inputs))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return sum(event.get("cat") == "Node" and event["name"].endswith("_kernel_time") for event in events)


def print_table(precision: str, context: str, threads: int, found: Mapping[str, Any], idle: Sequence[str]) -> None:
    """One row for each pass left out."""
    table = Table(
        title=f"{precision} of {context}, {threads} threads: median ms; in brackets: ratio to all passes, quartiles"
    )
    for column in ("left out", "nodes", "run", *SHAPES):
        table.add_column(column, justify="left" if column == "left out" else "right")
    for name, row in found.items():
        cells = []
        for shape in SHAPES:
            ratio = row["ratio"][shape]
            bounds = f"{ratio['median']:.2f}, {ratio['quartile_1']:.2f}–{ratio['quartile_3']:.2f}"
            cells.append(f"{row['milliseconds'][shape]['median']:.2f}" + (f" ({bounds})" if name != ALL else ""))
        table.add_row("nothing" if name == ALL else name, str(row["nodes"]), str(row["nodes_run"]), *cells)
    for name in idle:
        table.add_row(name, "", "", *["finds nothing to do"] * len(SHAPES))
    Console(width=160).print(table)


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default="demo/model.pt")
@click.option("--context", help="The context.  [default: the first]")
@click.option("--precision", "precisions", default="fp32,int8", help="Of the engines, separated by commas.")
@click.option("--rounds", default=60)
@click.option("--name", default="graph_passes", help="Name of the file of results.")
def main(model: Path, context: str | None, precisions: str, rounds: int, name: str) -> None:
    source, threads = open_source(model), available_cores()
    chosen = source.choose(None)
    context = context or chosen[0]
    dynamic = source.capture(opset=BuildConfig().opset)
    frozen, accounts = freeze_contexts(source, dynamic, chosen, {}, None, lambda: None)
    parameters = wholes(dynamic, frozen, accounts, source.calibration)
    result = {}
    for precision in precisions.split(","):
        with tempfile.TemporaryDirectory() as folder, BundleWriter(Path(folder) / "engines.cpc") as writer:
            engines = build_engines(frozen, parameters, context, precision, writer)
            idle = [key for key, each in engines.items() if key != ALL and same_graph(each.graph, engines[ALL].graph)]
            found = time_engines({key: each for key, each in engines.items() if key not in idle}, threads, rounds)
        print_table(precision, context, threads, found, idle)
        result[precision] = {"left_out": found, "nothing_to_do": idle}
    save(name, {"context": context, "threads": threads, "precisions": result})


if __name__ == "__main__":
    main()

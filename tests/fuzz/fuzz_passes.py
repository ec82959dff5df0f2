"""Optimize random graphs and compare each result with its original in ONNX Runtime.

    python -m tests.fuzz.fuzz_passes --cases 5000 [--seed 0]

Each graph goes through the default passes of `cpcompile opt`, and through a random selection of all passes. A result
may differ by rounding: by a multiple of what the original's outputs change when its weights and inputs are moved by a
few roundings. A finding is printed with its seed: `--seed SEED --cases 1` repeats it. Exit code 1 if there is any.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from cpcompile.pipeline.optimize import DEFAULT, PASSES, optimize_file
from tests.fuzz.batches import main, print_tally
from tests.fuzz.random_graphs import Array, RejectedError, session_of
from tests.fuzz.whole_graphs import RandomGraph, random_graph

MODULE = "tests.fuzz.fuzz_passes"
CASES_PER_PROCESS = 100
SECONDS_PER_PROCESS = 1800
ROUNDINGS, MULTIPLE = 64, 16
"""Of the largest number of an output, and of what small moves of the original change."""
MOVES = 6
NEED_VALUES = ("bind_context", "trim_vocabulary")


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    return [np.asarray(array) for array in session_of(model).run(None, dict(feeds))]


def moved(array: Array, rng: np.random.Generator) -> Array:
    """The floats of an array moved by a few roundings; zeros stay."""
    if array.dtype.kind != "f":
        return array
    return (array * (1 + 2.0**-21 * rng.uniform(-1, 1, array.shape))).astype(array.dtype)


def spread(graph: RandomGraph, feeds: Mapping[str, Array], expected: Sequence[Array]) -> list[float]:
    """How much small moves change each output; infinite where they change its shape."""
    most = [0.0] * len(expected)
    resized = [node for node in graph.model.graph.node if node.op_type in ("Resize", "Upsample")]
    scales = {name for node in resized for name in node.input[1:]}  # of the batch and channels: exactly 1
    for seed in range(MOVES):
        rng, other = np.random.default_rng(seed), onnx.ModelProto()
        other.CopyFrom(graph.model)
        for tensor in other.graph.initializer:
            if tensor.name not in scales:
                tensor.CopyFrom(numpy_helper.from_array(moved(numpy_helper.to_array(tensor), rng), tensor.name))
        got = run(other, {name: moved(array, rng) for name, array in feeds.items()})
        for number, (first, second) in enumerate(zip(expected, got, strict=True)):
            most[number] = max(most[number], distance(first, second))
    return most


def distance(first: Array, second: Array) -> float:
    """The largest difference; infinite between shapes or types, and where only one is not a number."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return np.inf
    first, second = first.astype(np.float64), second.astype(np.float64)
    if not np.array_equal(np.isfinite(first), np.isfinite(second)):
        return np.inf
    finite = np.isfinite(first)
    return float(np.abs(first[finite] - second[finite]).max(initial=0))


def difference(graph: RandomGraph, result: onnx.ModelProto, fixed: Sequence[str] = ()) -> str | None:
    """What differs between the original and the result, which has no inputs `fixed`; None if nothing does."""
    wanted, got_names = ([out.name for out in each.graph.output] for each in (graph.model, result))
    if wanted != got_names:
        return f"outputs {got_names} instead of {wanted}"
    for feeds in graph.feeds:
        expected = run(graph.model, feeds)
        got = run(result, {name: array for name, array in feeds.items() if name not in fixed})
        for number, (first, second) in enumerate(zip(expected, got, strict=True)):
            error, largest = distance(first, second), float(np.abs(first.astype(np.float64)).max(initial=0))
            if error <= ROUNDINGS * np.finfo(np.float32).eps * largest:
                continue
            allowed = MULTIPLE * spread(graph, feeds, expected)[number]
            if error > allowed:
                return (
                    f"{wanted[number]} {first.dtype}{list(first.shape)} -> {second.dtype}{list(second.shape)} "
                    f"differs by {error:.3g} of {largest:.3g}, allowed are {allowed:.3g}"
                )
    return None


def selections(graph: RandomGraph, rng: np.random.Generator) -> list[Sequence[str]]:
    """The default passes, and a random selection with repetitions."""
    names = [name for name in PASSES if name not in NEED_VALUES]
    chosen = rng.choice(names, int(rng.integers(1, 7))).tolist()
    if graph.contexts:
        chosen.insert(0, f"bind_context:context={int(graph.feeds[0]['region'])}:name=region")
    return [DEFAULT, chosen]


def _last_lines(text: str) -> str:
    """The cause first raised, with where that was."""
    first = text.split("\nThe above exception")[0].strip().splitlines()
    return " | ".join(line.strip() for line in first[-5:] if set(line.strip()) - set("^~ "))[:600]


def run_cases(first: int, count: int) -> None:
    """The cases of one process."""
    warnings.simplefilter("error")
    logging.disable(logging.WARNING)
    tally = Counter(graphs=0, optimized=0, smaller=0, nodes=0, nodes_left=0, parameters=0, parameters_left=0)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory(prefix="fuzz-passes-") as folder:
        for seed in range(first, first + count):
            print(f"case {seed}", flush=True)
            try:
                graph = random_graph(seed)
            except RejectedError:
                continue
            tally["graphs"] += 1
            source, out = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
            onnx.save(graph.model, source)
            for number, passes in enumerate(selections(graph, np.random.default_rng(seed))):
                out.unlink(missing_ok=True)
                try:
                    result = optimize_file(source, out, passes, check="none" if number or seed % 4 else "quick")
                    fixed = ["region"] if "region" in passes[0] else []
                    wrong = difference(graph, onnx.load(out), fixed)
                except Exception:  # the finding itself
                    wrong = _last_lines(traceback.format_exc())
                if wrong is not None:
                    print(f"FINDING {seed}: {','.join(passes)}: {wrong}", flush=True)
                    continue
                tally["optimized"] += 1
                if number == 0:
                    after = result.steps[-1].size
                    tally["smaller"] += after.parameters < result.before.parameters
                    tally["nodes"] += result.before.nodes
                    tally["nodes_left"] += after.nodes
                    tally["parameters"] += result.before.parameters
                    tally["parameters_left"] += after.parameters
    print_tally(tally)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, MODULE, run_cases, CASES_PER_PROCESS, SECONDS_PER_PROCESS))

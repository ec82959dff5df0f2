"""Generation beside what a user would pick: time per token as the text grows, prefill, decoding, the head, memory.

    python benchmarks/generation.py demo/model.pt demo/model.cpc
    python benchmarks/generation.py smollm2.pt smollm2.cpc --gguf SmolLM2-135M-Instruct.Q4_1.gguf

The peers are the dense baseline in eager torch with a cache of its own (that of transformers for pretrained models),
the dense baseline in ONNX Runtime GenAI where that is installed, and with --gguf the same model in llama.cpp, which
llama-cpp-python brings: as the file has it, and in float32. Sides are interleaved; figures are medians.

    growth    seconds per token at position 1,000 / at position 10; at most 1.5
    prefill   a prompt of 512 tokens until the first token
    decode    tokens per second at position 128
    head      a prompt of 128 tokens with the logits of all positions / of the last one; at least 1.2
    memory    the process after 16 and after 1,000 tokens; the cache and little else should be the difference
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import save, spread, time_sides
from llama_models import files_of, open_gguf
from rich.console import Console
from rich.table import Table

from cpcompile.bundle.reader import open_bundle
from cpcompile.core.generation import GenerationSettings
from cpcompile.core.paths import dense_path
from cpcompile.exporters.genai_exporter import export_genai
from cpcompile.frontend.capture import capture_dense
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.machine.environment import available_cores
from cpcompile.models.language_model import KeysValues, LanguageModel
from cpcompile.passes.keep_last_logits import KeepLastLogits
from cpcompile.runtime import Engine, load_engine

POSITIONS = (10, 128, 1000)
PREFILL, HEAD = 512, 128
Side = Callable[[], object]


def engine_sides(engine: Engine, ids: np.ndarray) -> dict[str, Side]:
    """One token at each of POSITIONS and after, and the prompts, with a context's engine."""
    sides: dict[str, Side] = {}
    for position in POSITIONS:
        text = engine.generate(ids[0, :position].tolist(), tokens=1_000)
        next(text)
        sides[f"decode {position}"] = lambda text=text: next(text)
    sides[f"prefill {PREFILL}"] = lambda: engine.step(ids[:, :PREFILL], logits_to_keep=1)
    sides[f"head {HEAD} last"] = lambda: engine.step(ids[:, :HEAD], logits_to_keep=1)
    sides[f"head {HEAD} all"] = lambda: engine.step(ids[:, :HEAD])
    return sides


def eager_sides(model: LanguageModel, ids: np.ndarray) -> dict[str, Side]:
    """The same with the dense model in torch."""
    caches = model.caches()
    assert caches is not None
    tokens = torch.from_numpy(ids)

    def step(new: torch.Tensor, past: list[KeysValues]) -> list[KeysValues]:
        length = past[0][0].shape[2]
        mask = torch.ones((1, length + new.shape[1]), dtype=torch.int64)
        positions = torch.arange(length, length + new.shape[1])[None]
        with torch.inference_mode():
            return list(model.decode(new, mask, positions, torch.tensor(1), past)[1])

    empty = [(torch.zeros(1, c.heads, 0, c.head_dim), torch.zeros(1, c.heads, 0, c.head_dim)) for c in caches]
    sides: dict[str, Side] = {}
    for position in POSITIONS:
        past = step(tokens[:, :position], empty)
        sides[f"decode {position}"] = lambda past=past: step(tokens[:, :1], past)
    sides[f"prefill {PREFILL}"] = lambda: step(tokens[:, :PREFILL], empty)
    return sides


def genai_sides(model: LanguageModel, ids: np.ndarray, folder: Path) -> dict[str, Side]:
    """The same with a plain export of the dense model in ONNX Runtime GenAI; nothing where that is not installed."""
    try:
        import onnxruntime_genai as genai
    except ImportError:
        return {}
    dense = capture_dense(model, cached=True)
    KeepLastLogits()(dense)
    settings = GenerationSettings(end=(0,))
    export_genai({"dense": dense}, folder, settings={"dense": settings}, session_options={"dense": {}})
    loaded = genai.Model(str(folder))

    def begin(position: int) -> Any:
        options = genai.GeneratorParams(loaded)
        options.set_search_options(max_length=position + 1000, min_length=position + 1000)
        generator = genai.Generator(loaded, options)
        generator.append_tokens(ids[0, :position].tolist())
        return generator

    sides: dict[str, Side] = {f"decode {position}": begin(position).generate_next_token for position in POSITIONS}
    return sides | {f"prefill {PREFILL}": lambda: begin(PREFILL)}


def llama_cpp_sides(gguf: Path, ids: np.ndarray, threads: int) -> dict[str, Side]:
    """The same with llama.cpp."""

    def begin(position: int) -> Any:
        loaded = open_gguf(gguf, threads)
        loaded.eval(ids[0, :position].tolist())
        return loaded

    whole = begin(1)

    def prefill() -> None:
        whole.reset()
        whole.eval(ids[0, :PREFILL].tolist())

    decoding = {f"decode {position}": partial(begin(position).eval, [5]) for position in POSITIONS}
    return {**decoding, f"prefill {PREFILL}": prefill}


def memory_of(bundle: Path, context: str, tokens: int) -> dict[str, int]:
    """Resident bytes of a fresh process that writes `tokens`, at the last of them, and of these the private ones."""
    code = (
        "import sys, json; from cpcompile.runtime import load; from cpcompile.machine.procfs import status_bytes;"
        "e = load(sys.argv[1], sys.argv[2]); n = int(sys.argv[3]);"
        "text = e.engine.generate([5], tokens=n);"
        "[next(text) for _ in range(n - 1)];"  # its buffers are still there
        "print(json.dumps({'rss': status_bytes('VmRSS'), 'private': status_bytes('RssAnon')}))"
    )
    command = [sys.executable, "-c", code, str(bundle), context, str(tokens)]
    found: dict[str, int] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return found


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True), default="demo/model.pt")
@click.argument("bundle", type=click.Path(path_type=Path, exists=True), default="demo/model.cpc")
@click.option("--context", help="The context.  [default: the first]")
@click.option("--gguf", type=click.Path(path_type=Path, exists=True), help="The same model for llama.cpp.")
@click.option("--rounds", default=30)
@click.option("--name", default="generation", help="Name of the file of results.")
def main(model: Path, bundle: Path, context: str | None, gguf: Path | None, rounds: int, name: str) -> None:
    opened = open_bundle(bundle)
    context, threads = context or opened.contexts[0], available_cores()
    torch.set_num_threads(threads)
    engine = load_engine(opened, context, threads=threads)
    ids = np.random.default_rng(0).integers(0, engine.vocabulary or 256, (1, max(*POSITIONS, PREFILL)))
    sides = {("engine", what): side for what, side in engine_sides(engine, ids).items()}
    dense = load_checkpoint(dense_path(model)).model
    sides |= {("eager dense", what): side for what, side in eager_sides(dense, ids).items()}
    folder = tempfile.TemporaryDirectory()
    sides |= {("GenAI dense", what): side for what, side in genai_sides(dense, ids, Path(folder.name)).items()}
    if gguf is not None:
        for peer, file in files_of(gguf, Path(folder.name)).items():
            sides |= {(peer, what): side for what, side in llama_cpp_sides(file, ids, threads).items()}
    seconds = time_sides({" / ".join(key): side for key, side in sides.items()}, rounds=rounds)
    found = {side: spread(runs) for side, runs in seconds.items()}
    table = Table(title=f"{context}, {threads} threads: median milliseconds; in brackets: the engine's speedup")
    peers = list(dict.fromkeys(side for side, _ in sides if side != "engine"))
    for column in ("", "engine", *peers):
        table.add_column(column, justify="right" if column else "left")
    for what in dict.fromkeys(what for _, what in sides):
        ours = found[f"engine / {what}"]["median"]
        times = [found.get(f"{peer} / {what}", {}).get("median") for peer in peers]
        cells = ["" if time is None else f"{1000 * time:.2f} ({time / ours:.2f}x)" for time in times]
        table.add_row(what, f"{1000 * ours:.2f}", *cells)
    Console().print(table)

    def ratio(above: str, below: str) -> float:
        return found[f"engine / {above}"]["median"] / found[f"engine / {below}"]["median"]

    growth, head = ratio("decode 1000", "decode 10"), ratio(f"head {HEAD} all", f"head {HEAD} last")
    memory = {tokens: memory_of(bundle, context, tokens) for tokens in (16, 1000)}
    cache = opened.metadata["cache"][context]["bytes_per_token"] * (1000 - 16)
    print(f"a token at position 1,000 takes {growth:.2f} times one at position 10 (at most 1.5)")
    print(f"{HEAD} tokens with all logits take {head:.2f} times those with the last ones (at least 1.2)")
    grown = memory[1000]["private"] - memory[16]["private"]
    print(f"984 more tokens took {grown / 1e6:.1f} MB of private memory; their cache has {cache / 1e6:.1f} MB")
    save(
        name,
        {
            "context": context,
            "threads": threads,
            "seconds": found,
            "growth": growth,
            "head": head,
            "memory": memory,
            "cache_bytes": cache,
        },
    )


if __name__ == "__main__":
    main()

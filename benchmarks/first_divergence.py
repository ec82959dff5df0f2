"""Find a planted fault: time and peak memory of the search, compared with one plain session of the same engine.

    cpcompile build demo/model.pt -o demo/model.cpc
    python benchmarks/first_divergence.py demo/model.pt demo/model.cpc

A matrix in the middle of an engine is perturbed by 1e-3 of each weight. The search gets two ONNX files, the perturbed
engine and the graph freshly frozen from the model. Each side runs in a fresh process without torch.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from common import save
from rich.console import Console

from cpcompile.bundle.reader import open_bundle
from cpcompile.files.onnx_file import opset_of
from cpcompile.frontend.source import open_source
from cpcompile.machine.subprocesses import in_fresh_process
from cpcompile.validation.divergence import engine_graph
from cpcompile.validation.expected_graphs import FreshGraphs

RELATIVE = 1e-3
SESSION = """
import json, sys
import numpy as np, onnxruntime as ort
from cpcompile.machine.memory import peak_resident_bytes
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for _ in range(3):
    session.run(None, dict(np.load(sys.argv[2])))
print(json.dumps({"peak_rss_bytes": peak_resident_bytes()}))
"""
SEARCH = """
import json, sys, time
import numpy as np, onnx_ir as ir
from cpcompile.machine.memory import peak_resident_bytes, resident_bytes
from cpcompile.validation.divergence import find_divergence
base = resident_bytes()
engine, reference, feeds = ir.load(sys.argv[1]), ir.load(sys.argv[3]), dict(np.load(sys.argv[2]))
started = time.perf_counter()
found = find_divergence(reference, engine, feeds, sliced=bool(int(sys.argv[4])))
assert "torch" not in sys.modules
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "base_rss_bytes": base,
    "peak_rss_bytes": peak_resident_bytes(),
    "found": found and str(found),
    "module": found and found.module,
    "nodes": [len(reference.graph), len(engine.graph)],
}))
"""


def write(model: ir.Model, path: Path) -> Path:
    ir.save(model, path, external_data=f"{path.name}.data")
    return path


def plant(engine: ir.Model, pattern: str) -> str:
    """Perturb all pieces of the middle matrix of those whose names match `pattern`; return its name."""
    names = [re.sub(r"\[\d+\]$", "", name) for name in engine.graph.initializers if re.search(pattern, name)]
    if not names:
        raise click.UsageError(f"no weight of the engine matches {pattern!r}; name another with --tensor")
    name = names[len(names) // 2]
    generator = np.random.default_rng(0)
    for own, value in engine.graph.initializers.items():
        if re.sub(r"\[\d+\]$", "", own) == name and value.const_value is not None:
            array = value.const_value.numpy()
            moved = array * (1 + RELATIVE * generator.standard_normal(array.shape))
            value.const_value = ir.tensor(moved.astype(array.dtype), name=own)
    return name


@click.command()
@click.argument("model", type=click.Path(path_type=Path), default="demo/model.pt")
@click.argument("bundle", type=click.Path(path_type=Path), default="demo/model.cpc")
@click.option("--context", help="By default the first of the bundle.")
@click.option("--tensor", default=r"down(_proj)?\.weight", help="Pattern of matrix names, one of which is perturbed.")
@click.option("--sequence", default=128)
def main(model: Path, bundle: Path, context: str | None, tensor: str, sequence: int) -> None:
    opened, source = open_bundle(bundle), open_source(model)
    context = context or opened.contexts[0]
    engine = engine_graph(opened.variant(context, "cpu-fp32"))
    tokens = opened.token_ids(context)
    dynamic = source.capture(opset=opset_of(engine))
    graphs = FreshGraphs(source, lambda _: dynamic, {} if tokens is None else {context: tokens})
    with tempfile.TemporaryDirectory(prefix="cpcompile-divergence-") as name:
        folder = Path(name)
        feeds = folder / "inputs.npz"
        np.savez(feeds, input_ids=np.random.default_rng(0).integers(0, 200, (1, sequence)))
        frozen = write(graphs.frozen(context, 0), folder / "frozen.onnx")
        bound = write(graphs.bound(context, 0), folder / "bound.onnx")
        sound = write(engine, folder / "sound.onnx")
        perturbed = plant(engine, tensor)
        planted = write(engine, folder / "planted.onnx")
        session = in_fresh_process("-c", SESSION, str(planted), str(feeds))
        searches = {
            "planted, frozen": in_fresh_process("-c", SEARCH, str(planted), str(feeds), str(frozen), "0"),
            "planted, bound": in_fresh_process("-c", SEARCH, str(planted), str(feeds), str(bound), "1"),
            "sound, frozen": in_fresh_process("-c", SEARCH, str(sound), str(feeds), str(frozen), "0"),
            "sound, bound": in_fresh_process("-c", SEARCH, str(sound), str(feeds), str(bound), "1"),
        }
    show = Console().print
    show(f"{perturbed} perturbed by {RELATIVE:g}; one session peaks at {session['peak_rss_bytes'] / 1e6:.0f} MB")
    for side, search in searches.items():
        ratio = search["peak_rss_bytes"] / session["peak_rss_bytes"]
        peak, nodes = f"{search['peak_rss_bytes'] / 1e6:.0f} MB ({ratio:.2f}x)", " and ".join(map(str, search["nodes"]))
        show(f"{side}: {nodes} nodes in {search['seconds']:.1f} s, peak {peak}: {search['found']}", highlight=False)
    save("first_divergence", {"perturbed": perturbed, "relative": RELATIVE, "session": session, "searches": searches})


if __name__ == "__main__":
    main()

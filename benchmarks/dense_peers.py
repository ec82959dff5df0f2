"""The dense baseline in everything that a user would run instead of an engine, see `peers`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from common import feeds_of, onnx_session
from llama_models import files_of, open_gguf
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from cpcompile.core.cache import INPUT, OUTPUT, complete
from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Feeds
from cpcompile.exporters.onnxruntime_exporter import EXACT_PRODUCTS
from cpcompile.frontend.capture import capture_dense
from cpcompile.models.language_model import LanguageModel

Shape = tuple[int, int, int]
"""Batch, tokens, tokens in the cache."""
SHAPES: Sequence[Shape] = ((1, 1, 256), (1, 16, 0), (1, 128, 0), (1, 512, 0), (4, 128, 0))
BLOCK = 32
OPENVINO: Mapping[str, tuple[str, str, str | None]] = {
    "OpenVINO fp32": ("ORT fp32", "f32", None),
    "OpenVINO bf16": ("ORT fp32", "bf16", None),
    "OpenVINO int8 weights": ("ORT int8 weights", "f32", "u8"),
    "OpenVINO int4 weights": ("ORT int4 weights", "f32", "u4"),
}
"""Side -> whose file it reads, in what it computes, and in what it has to keep rounded weights."""


@dataclass(frozen=True)
class Side:
    """Something that gives the logits of tokens, for the shapes in `feeds`. graph, weights: its files, where known."""

    run: Callable[[Feeds], Any]
    feeds: Mapping[Shape, Feeds]
    ours: bool = False
    graph: Path | None = None
    weights: Path | None = None

    def bytes(self) -> int | None:
        """The size of its files."""
        if self.graph is None:
            return None
        data = [self.graph.with_name(f"{self.graph.name}.data"), *(self.weights.iterdir() if self.weights else ())]
        return self.graph.stat().st_size + sum(path.stat().st_size for path in data if path.exists())


Sides = dict[str, Side | NotMeasured]
"""By name; in place of a side that cannot run here, the reason."""


def session_side(session: Any, **options: Any) -> Side:
    """A graph in ONNX Runtime."""
    shapes = {each.name: each.shape for each in session.get_inputs()}
    feeds = {shape: feeds_of(shapes, *shape) for shape in SHAPES}
    return Side(lambda given: session.run([OUTPUT], complete(given, shapes))[0], feeds, **options)


def dense_sides(model: LanguageModel, gguf: Path | None, folder: Path, threads: int) -> Sides:
    """Everything that runs the dense model; files go to `folder`. gguf: its file for llama.cpp, if there is one."""
    paths = onnx_files(model, folder)
    peers = onnxruntime_sides(paths, threads) | openvino_sides(paths, threads)
    return torch_sides(model) | peers | llama_cpp_sides(gguf, folder, threads)


def torch_sides(model: LanguageModel) -> Sides:
    """In torch, with a cache of its own where there is one to follow."""
    caches = model.caches()
    assert caches is not None
    feeds = {shape: feeds_of({}, *shape) for shape in SHAPES}
    past = {}
    for batch, tokens, length in SHAPES:
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

    without_cache = {shape: each for shape, each in feeds.items() if not shape[2]}
    return {"eager": Side(eager, feeds), "torch.compile": Side(fast, without_cache)}


def onnx_files(model: LanguageModel, folder: Path) -> dict[str, Path]:
    """Files for ONNX Runtime: as the model is exported, and quantised in the ways that ONNX Runtime offers."""
    exported, folded = folder / "exported.onnx", folder / "fp32.onnx"
    ir.save(capture_dense(model, cached=True), exported, external_data="exported.onnx.data")
    # Quantisers find only products with weights, not with transposed ones: constants have to be folded first.
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    ort.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    paths = {"ORT fp32": folded, "ORT int8": folder / "int8.onnx"}
    logging.disable(logging.INFO)  # quantisers report every node
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
    return paths


def onnxruntime_sides(paths: Mapping[str, Path], threads: int) -> Sides:
    """The files of `onnx_files` in ONNX Runtime."""
    sides: Sides = {name: session_side(onnx_session(path, threads), graph=path) for name, path in paths.items()}
    exact = onnx_session(paths["ORT int8"], threads, EXACT_PRODUCTS)
    return sides | {"ORT int8, exact": session_side(exact, graph=paths["ORT int8"])}


def openvino_sides(paths: Mapping[str, Path], threads: int) -> Sides:
    """The same files in OpenVINO."""
    try:
        import openvino
    except ImportError:
        return dict.fromkeys(OPENVINO, NotMeasured("openvino is not installed"))
    core, sides = openvino.Core(), Sides()
    for name, (source, precision, rounded) in OPENVINO.items():
        if precision.upper() not in {"F32", *core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")}:
            sides[name] = NotMeasured(f"this processor has no instructions for {precision}")
            continue
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(str(paths[source]), "CPU", settings)
        kept = types_of_weights(compiled)
        if rounded is None or kept == {rounded}:
            sides[name] = openvino_side(compiled)
        else:
            sides[name] = NotMeasured(f"OpenVINO turned the weights into {', '.join(sorted(kept))}")
    return sides


def types_of_weights(compiled: Any) -> set[str]:
    """In what a compiled model has the weights of its products."""
    nodes = compiled.get_runtime_model().get_ops()
    products = [node for node in nodes if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    return {node.input(1).get_element_type().get_type_name() for node in products}


def openvino_side(compiled: Any) -> Side:
    """A compiled model in OpenVINO."""
    shapes = {
        min(each.get_names()): [d.get_length() if d.is_static else None for d in each.get_partial_shape()]
        for each in compiled.inputs
    }
    request = compiled.create_infer_request()

    def run(given: Feeds) -> np.ndarray:
        found = request.infer(complete(given, shapes), share_inputs=True)
        return np.asarray(next(found[each] for each in found if OUTPUT in each.get_names()))

    return Side(run, {shape: feeds_of(shapes, *shape) for shape in SHAPES})


def llama_cpp_sides(gguf: Path | None, folder: Path, threads: int) -> Sides:
    """The same model in llama.cpp, which reads one text at a time here."""
    if gguf is None:
        return {"llama.cpp": NotMeasured("no --gguf names the file of this model")}
    return {name: llama_cpp_side(file, threads) for name, file in files_of(gguf, folder).items()}


def llama_cpp_side(gguf: Path, threads: int) -> Side:
    """A file in llama.cpp."""
    feeds = {shape: feeds_of({}, *shape) for shape in SHAPES if shape[0] == 1}
    past = max(shape[2] for shape in feeds)
    loaded, following = (open_gguf(gguf, threads, all_logits=True) for _ in range(2))
    following.eval([0] * past)

    def run(given: Feeds) -> np.ndarray:
        ids = given[INPUT]
        if ids.shape == (1, 1):
            following.n_tokens = past  # what was read behind the cache is forgotten
            following.eval(ids[0].tolist())
            return following.scores[None, past : past + 1]
        logits = []
        for row in ids.tolist():
            loaded.reset()
            loaded.eval(row)
            logits.append(loaded.scores[: len(row)].copy())
        return np.stack(logits)

    return Side(run, feeds)

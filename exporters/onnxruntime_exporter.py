"""ONNX Runtime: a frozen graph -> `cpu-fp32/model.onnx`, `cpu-int8/…` or `cuda-fp16/…`, weights shared or inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from cpcompile.bundle.artifact import Artifact
from cpcompile.core.rounding import QUANTIZED
from cpcompile.exporters.weights_file import Location, refer_to_weights

MODEL_FILE = "model.onnx"
MERGED = "cpu-fp32-merged"
EXACT_PRODUCTS: Mapping[str, str] = {"session.x64quantprecision": "1"}
"""Session options of products with weights in 8 bits. Without them, x64 without VNNI adds up two in 16 bits, which
overflow; with weights in 7 bits they cannot."""


def export_onnxruntime(
    model: ir.Model,
    folder: Path,
    *,
    weights: Path | None,
    locations: Mapping[str, Location],
    contexts: tuple[str, ...] = (),
    precision: str = "fp32",
    cuda: bool = False,
) -> Artifact:
    """Write `model` to `folder`; its initializers refer to the file `weights`, or are inside if there is none.

    contexts: those that the input of a merged model selects from. precision: what the graph computes in. cuda: whether
    the engine is one for a GPU.
    """
    shared = refer_to_weights(model, weights, locations) if weights is not None else 0
    ir.save(model, folder / MODEL_FILE)
    return Artifact(
        variant=MERGED if contexts else variant_name(precision, cuda=cuda),
        runtime="onnxruntime",
        precision=precision,
        provider="CUDAExecutionProvider" if cuda else "CPUExecutionProvider",
        device="gpu" if cuda else "cpu",
        model_file=MODEL_FILE,
        files=(MODEL_FILE,),
        shared_bytes=shared,
        contexts=contexts,
        session_options=EXACT_PRODUCTS if "int8" in _schemes(model) else {},
        provider_options={"use_tf32": "0"} if cuda else {},
    )


def _schemes(model: ir.Model) -> set[str]:
    """The schemes by which the parameters of `model` are rounded."""
    return set(json.loads(model.metadata_props.get(QUANTIZED, "{}")).values())


def variant_name(precision: str, *, cuda: bool = False) -> str:
    """The name of a variant: device and precision."""
    return f"{'cuda' if cuda else 'cpu'}-{precision}"

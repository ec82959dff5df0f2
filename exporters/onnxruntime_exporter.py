"""ONNX Runtime: a frozen graph -> `cpu-fp32/model.onnx` or `cuda-fp16/model.onnx`, weights shared or inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from cpcompile.bundle.artifact import Artifact
from cpcompile.exporters.weights_file import Location, refer_to_weights

MODEL_FILE = "model.onnx"
SINGLE, MERGED = "cpu-fp32", "cpu-fp32-merged"


def export_onnxruntime(
    model: ir.Model,
    folder: Path,
    *,
    weights: Path | None,
    locations: Mapping[str, Location],
    contexts: tuple[str, ...] = (),
    cuda_precision: str | None = None,
) -> Artifact:
    """Write `model` to `folder`; its initializers refer to the file `weights`, or are inside if there is none.

    contexts: those that the input of a merged model selects from. cuda_precision: the precision of an engine for a
    GPU, which computes in the graph's own types.
    """
    shared = refer_to_weights(model, weights, locations) if weights is not None else 0
    ir.save(model, folder / MODEL_FILE)
    return Artifact(
        variant=cuda_variant(cuda_precision) if cuda_precision else MERGED if contexts else SINGLE,
        runtime="onnxruntime",
        precision=cuda_precision or "fp32",
        provider="CUDAExecutionProvider" if cuda_precision else "CPUExecutionProvider",
        device="gpu" if cuda_precision else "cpu",
        model_file=MODEL_FILE,
        files=(MODEL_FILE,),
        shared_bytes=shared,
        contexts=contexts,
        provider_options={"use_tf32": "0"} if cuda_precision else {},
    )


def cuda_variant(precision: str) -> str:
    """The name of a CUDA variant: device and precision."""
    return f"cuda-{precision}"

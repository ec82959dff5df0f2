"""ONNX Runtime: a frozen graph -> `cpu-fp32/model.onnx`, its weights in the shared file or inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from cpcompile.artifact import Artifact
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
) -> Artifact:
    """Write `model` to `folder`; its initializers refer to `weights`, without which the model is self-contained.

    `contexts`: those that a merged model chooses from by its input.
    """
    shared = refer_to_weights(model, weights, locations) if weights is not None else 0
    ir.save(model, folder / MODEL_FILE)
    return Artifact(
        variant=MERGED if contexts else SINGLE,
        runtime="onnxruntime",
        precision="fp32",
        provider="CPUExecutionProvider",
        device="cpu",
        model_file=MODEL_FILE,
        files=(MODEL_FILE,),
        shared_bytes=shared,
        contexts=contexts,
    )

"""OpenVINO: a frozen graph in the operators of the standard -> `openvino-bf16/model.onnx`, weights shared or inside.

The graph is the same in every precision: which one it computes in is said to OpenVINO when the engine is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from cpcompile.bundle.artifact import Artifact
from cpcompile.exporters.weights_file import Location, refer_to_weights
from cpcompile.targets.requests import OPENVINO

MODEL_FILE = "model.onnx"


def export_openvino(
    model: ir.Model, folder: Path, *, weights: Path | None, locations: Mapping[str, Location], precision: str
) -> Artifact:
    """Write `model` to `folder`; its initializers refer to the file `weights`, or are inside if there is none."""
    shared = refer_to_weights(model, weights, locations) if weights is not None else 0
    ir.save(model, folder / MODEL_FILE)
    return Artifact(
        variant=variant_name(precision),
        runtime=OPENVINO,
        precision=precision,
        provider="",
        device="cpu",
        model_file=MODEL_FILE,
        files=(MODEL_FILE,),
        shared_bytes=shared,
    )


def variant_name(precision: str) -> str:
    """The name of a variant: runtime and precision."""
    return f"{OPENVINO}-{precision}"

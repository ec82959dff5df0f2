"""Change bundles as somebody would who knows how they are sealed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from cpcompile.bundle.artifact import Artifact
from cpcompile.bundle.manifest import manifest_digest
from cpcompile.files.whole_files import file_digest
from cpcompile.frontend.capture import capture
from cpcompile.frontend.checkpoint import load_checkpoint
from cpcompile.passes.freeze import freeze
from cpcompile.targets.plan_info import PlanInfo, Profile, TensorInfo

ARTIFACT = Artifact(
    variant="cpu-fp32",
    runtime="onnxruntime",
    precision="fp32",
    provider="CPUExecutionProvider",
    device="cpu",
    model_file="model.onnx",
    files=("model.onnx",),
    shared_bytes=0,
)
"""An engine of the CPU in one file, without shared weights."""
PLAN_INFO = PlanInfo(
    flavour="tensorrt-rtx",
    version="1.7.1.116",
    capabilities=("sm86",),
    precision="fp16",
    profiles=(Profile(name="default", shapes={"x": ((4,), (4,), (4,))}),),
    tensors=(TensorInfo(name="x", is_input=True, dtype="float32", shape=(4,)),),
    onnx_digest="0" * 64,
)
"""What is recorded of a plan with one input."""


def reseal(bundle: Path, edit: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """`edit` the manifest, then make every digest fit again."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = manifest["additional_metadata"]["cpcompile"]["files"]
    files.update({name: file_digest(bundle / name) for name in files if (bundle / name).is_file()})
    edit(manifest)
    manifest["additional_metadata"]["cpcompile"]["manifest_digest"] = manifest_digest(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def whole_text_graph(model: Path, context: str) -> ir.Model:
    """The graph of an engine as it was before engines had a cache: it reads whole texts, and has its weights inside."""
    checkpoint = load_checkpoint(model)
    return freeze(capture(checkpoint.model), checkpoint.contexts.index(context)).model

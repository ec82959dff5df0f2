"""NVIDIA Triton: an engine -> one model of a repository for its backend `onnxruntime`.

    DIR/<context>/config.pbtxt   DIR/<context>/1/model.onnx

Sources: triton-inference-server/common, protobuf/model_config.proto; onnxruntime_backend, src/onnxruntime.cc (scalars).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from cpcompile.core.errors import UsageError

VERSION = "1"
MODEL_FILE = "model.onnx"
TYPES = {
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.BFLOAT16: "TYPE_BF16",
    ir.DataType.DOUBLE: "TYPE_FP64",
    ir.DataType.INT8: "TYPE_INT8",
    ir.DataType.INT16: "TYPE_INT16",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.INT64: "TYPE_INT64",
    ir.DataType.UINT8: "TYPE_UINT8",
    ir.DataType.UINT16: "TYPE_UINT16",
    ir.DataType.UINT32: "TYPE_UINT32",
    ir.DataType.UINT64: "TYPE_UINT64",
    ir.DataType.BOOL: "TYPE_BOOL",
    ir.DataType.STRING: "TYPE_STRING",
}


def export_triton(graph: ir.Graph, folder: Path, name: str) -> Path:
    """Make the model `name` of the repository `folder`; returns where its self-contained ONNX file has to be put."""
    (folder / name / VERSION).mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(triton_config(graph, name), encoding="utf-8")
    return folder / name / VERSION / MODEL_FILE


def triton_config(graph: ir.Graph, name: str) -> str:
    """The content of config.pbtxt; UsageError for an input or output whose type or rank is unknown to Triton."""
    return (
        f"name: {json.dumps(name)}\n"
        'backend: "onnxruntime"\n'
        "max_batch_size: 0\n"  # the batch is an axis of the graph like any other
        f"input [\n{_listed(graph.inputs)}\n]\n"
        f"output [\n{_listed(graph.outputs)}\n]\n"
    )


def _listed(values: Iterable[ir.Value]) -> str:
    return ",\n".join(map(_described, values))


def _described(value: ir.Value) -> str:
    if value.dtype not in TYPES or value.shape is None:
        raise UsageError(f"{value.name}: is {value.dtype} of shape {value.shape}, which Triton cannot describe")
    sizes = [size if isinstance(size, int) else -1 for size in value.shape] or [1]  # a scalar has one element
    name = json.dumps(value.name, ensure_ascii=False)
    return f"  {{ name: {name}, data_type: {TYPES[value.dtype]}, dims: [ {', '.join(map(str, sizes))} ] }}"

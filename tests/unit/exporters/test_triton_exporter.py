"""The configuration for Triton is one by its own schema, and says what the graph takes; Triton itself is not run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from google.protobuf import text_format

from cpcompile.core.errors import UsageError
from cpcompile.exporters.triton_exporter import export_triton, triton_config
from cpcompile.passes.freeze import freeze
from tests.unit.passes.decoders import dynamic_graph, random_decoder, random_selection
from tests.unit.passes.graph_text import parse

KINDS = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32}


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """The module with the schema alone: the package around it needs gRPC."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_configuration_says_runs(schema: Any, tmp_path: Path) -> None:
    model = random_decoder(2, 4)
    model.select(random_selection(model, 4))
    frozen = freeze(dynamic_graph(model, 23, cached=True), 1).model
    ir.save(frozen, export_triton(frozen.graph, tmp_path, "english"))
    folder = tmp_path / "english"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "1/model.onnx",
        "config.pbtxt",
    ]
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("english", "onnxruntime", 0)
    session = ort.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in config.input] == [each.name for each in session.get_inputs()]
    feeds = {}
    for given, declared in zip(config.input, session.get_inputs(), strict=True):
        # Two tokens of one text after no others; Triton passes one element as a scalar where the graph has one.
        sizes = {"batch": 1, "sequence": 2, "total": 2, "past": 0}
        known = [sizes.get(axis, axis) for axis in declared.shape]
        assert list(given.dims) == ([axis if isinstance(axis, int) else -1 for axis in declared.shape] or [1])
        feeds[given.name] = np.ones(known, KINDS[schema.DataType.Name(given.data_type)])
    outputs = session.run(None, feeds)
    for made, declared in zip(outputs, config.output, strict=True):
        assert made.dtype == KINDS[schema.DataType.Name(declared.data_type)]
        assert made.ndim == len(declared.dims)
        assert all(size in (-1, real) for size, real in zip(declared.dims, made.shape, strict=True))


def test_names_are_quoted_and_unknown_types_refused(schema: Any) -> None:
    graph = parse("(float[N,3] x, bool[N] y) => (float[N,3] z) { z = Identity(x) }", {}).graph
    graph.inputs[0].name = 'a "b"\\é'
    config = text_format.Parse(triton_config(graph, "c.1-x"), schema.ModelConfig())
    assert [each.name for each in config.input] == ['a "b"\\é', "y"]
    assert [list(each.dims) for each in config.input] == [[-1, 3], [-1]]
    odd = parse("(float[N] x) => (complex64[N] z) { z = Cast<to = 14>(x) }", {}).graph
    with pytest.raises(UsageError, match="z: is COMPLEX64 .*Triton cannot describe"):
        triton_config(odd, "odd")

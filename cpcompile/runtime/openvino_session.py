"""Run a graph of the standard in OpenVINO on the CPU, with the methods of an InferenceSession that `Engine` calls.

    verified graph -> its initializers in the weights file become inputs     OpenVINO opens no file
                   -> those become constants in a mapping of that file       pages are read when they are needed
                   -> compiled for this processor in the precision of the variant

OpenVINO computes in float32 without a word where the processor has no bfloat16; here that is an error.
Sources: OpenVINO, "CPU Device" and "Precision Control"; openvino.op.Constant (shared_memory).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import local
from types import SimpleNamespace
from typing import Any

import numpy as np

from cpcompile.bundle.reader import Variant
from cpcompile.core.errors import CpcompileError, UsageError, first_line
from cpcompile.core.types import Array, Feeds
from cpcompile.files.external_data import Detached, detach_data

HINTS: Mapping[str, str] = {"fp32": "f32", "bf16": "bf16"}
"""Precision of a variant -> INFERENCE_PRECISION_HINT."""
FLOATS: Mapping[str, str] = {"float32": "float", "float64": "double"}
"""Types that ONNX Runtime calls otherwise than numpy."""
NO_BF16 = "this processor has no instructions for bfloat16"
ANY = "any"
"""In place of the length of a dynamic axis, whose name OpenVINO does not keep."""


@dataclass(frozen=True)
class Argument:
    """An input or output, as onnxruntime.NodeArg describes it."""

    name: str
    type: str
    shape: Sequence[int | str]


class OpenVinoSession:
    """A compiled model. It may be used by many threads; runs wait for one of its streams."""

    def __init__(self, model: Path, compiled: Any, detached: Detached, data: Mapping[str, mmap.mmap]) -> None:
        """data: what the constants of `compiled` lie in."""
        self._model = model
        self._data = data
        self._requests = local()
        self._inputs = [_argument(name, compiled.input(name)) for name in detached.inputs]
        self._outputs = [_argument(name, compiled.output(name)) for name in detached.outputs]
        self.compiled = compiled
        """The openvino.CompiledModel."""

    def get_inputs(self) -> list[Argument]:
        """The inputs, in the order of the graph."""
        return self._inputs

    def get_outputs(self) -> list[Argument]:
        """The outputs, in the order of the graph."""
        return self._outputs

    def get_modelmeta(self) -> Any:
        """No metadata: they describe operators of ONNX Runtime, which these graphs do not have."""
        return SimpleNamespace(custom_metadata_map={})

    def run(self, names: Sequence[str], feeds: Feeds) -> list[Array]:
        """The outputs `names`, which nothing else refers to; CpcompileError if OpenVINO refuses `feeds`."""
        try:
            if not hasattr(self._requests, "own"):
                self._requests.own = self.compiled.create_infer_request()
            found = self._requests.own.infer(dict(feeds), share_inputs=True)
            return [found[name] for name in names]
        except RuntimeError as error:
            raise CpcompileError(f"{self._model}: OpenVINO cannot run it on these inputs: {_reason(error)}") from error


def why_not_here(variant: Variant) -> str | None:
    """The reason why OpenVINO cannot run `variant` on this machine; None if no obstacle is known."""
    try:
        library = _library()
    except CpcompileError as error:
        return str(error)
    return None if variant.precision != "bf16" or _has_bf16(library) else NO_BF16


def load_session(variant: Variant, *, threads: int = 0, streams: int = 1) -> OpenVinoSession:
    """Load `variant`, whose files have been verified; parameters and errors as in `open_session`."""
    if (reason := why_not_here(variant)) is not None:
        raise CpcompileError(f"{variant.model}: {reason}")
    return open_session(
        variant.model, variant.weights or variant.model.parent, variant.precision, threads=threads, streams=streams
    )


def open_session(model: Path, data: Path, precision: str, *, threads: int = 0, streams: int = 1) -> OpenVinoSession:
    """Compile the file `model`, whose external tensors lie in files of the folder `data`.

    threads: of each run, 0 leaves the number to OpenVINO. streams: how many runs are computed at the same time.
    UsageError: a precision that OpenVINO does not have. CpcompileError: OpenVINO is not installed, cannot compile the
    model, or would compute it in another precision.
    """
    if precision not in HINTS:
        raise UsageError(f"{model}: OpenVINO does not compute in {precision!r}; build the bundle again")
    library = _library()
    settings = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": streams}
    settings |= {"INFERENCE_NUM_THREADS": threads * streams} if threads else {}
    detached = detach_data(model)
    files = {each.location: _mapped(data / each.location) for each in detached.references}
    try:
        core = library.Core()
        graph = core.read_model(detached.model)
        _attach(library, graph, detached, files)
        compiled = core.compile_model(graph, "CPU", settings)
        session = OpenVinoSession(model, compiled, detached, files)
    except RuntimeError as error:
        version = library.__version__.partition("-")[0]
        raise CpcompileError(f"{model}: OpenVINO {version} cannot compile it: {_reason(error)}") from error
    if (found := compiled.get_property("INFERENCE_PRECISION_HINT")) != getattr(library.Type, HINTS[precision]):
        raise CpcompileError(f"{model}: OpenVINO would compute in {found.get_type_name()} here; choose openvino-fp32")
    for each in files.values():
        each.madvise(mmap.MADV_DONTNEED)  # most of it was rearranged for the processor, in a copy
    return session


def _library() -> Any:
    """The module openvino; CpcompileError if it cannot be imported."""
    try:
        import openvino
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise CpcompileError(f"openvino cannot be imported ({first_line(error)})") from error
        raise CpcompileError("openvino is not installed: pip install 'cpcompile[openvino]'") from error
    except ImportError as error:
        raise CpcompileError(f"openvino cannot be imported ({first_line(error)})") from error
    return openvino


def _has_bf16(library: Any) -> bool:
    return "BF16" in library.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _mapped(path: Path) -> mmap.mmap:
    """A private mapping, because OpenVINO takes no memory that cannot be written to; nothing writes to it."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _attach(library: Any, graph: Any, detached: Detached, files: Mapping[str, mmap.mmap]) -> None:
    """Put constants in the place of the inputs that stand for tensors in `files`; RuntimeError if they are larger."""
    for each in detached.references:
        parameter = graph.input(each.name).get_node()
        kind = parameter.get_element_type()
        end = each.offset + math.prod(each.dims) * kind.size
        if end > len(files[each.location]) or each.length not in (None, end - each.offset):
            raise RuntimeError(f"{each.name} is not as long as its shape {each.dims} says")
        elements = np.frombuffer(files[each.location], np.uint8, end - each.offset, each.offset)
        tensor = library.Tensor(elements, library.Shape(each.dims), kind)
        parameter.output(0).replace(library.op.Constant(tensor, shared_memory=True).output(0))
        graph.remove_parameter(parameter)


def _argument(name: str, port: Any) -> Argument:
    shape = [length.get_length() if length.is_static else ANY for length in port.get_partial_shape()]
    dtype = np.dtype(port.get_element_type().to_dtype()).name
    return Argument(name, f"tensor({FLOATS.get(dtype, dtype)})", shape)


def _reason(error: RuntimeError) -> str:
    """The line of OpenVINO's message that tells most: of a summary the last item, else the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    items = [line.removeprefix("-- ") for line in lines if line.startswith("-- ")]
    return (items or lines or ["it gives no reason"])[-1]

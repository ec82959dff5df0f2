"""Run a plan of TensorRT 10, 11 or TensorRT-RTX on an NVIDIA GPU; the buffers are torch tensors.

    feeds -> the profile that admits their shapes -> buffers -> execute_async_v3 on a stream of its own -> outputs

Buffers, addresses and shapes are kept while shapes repeat. With TensorRT, the second run of the same shapes is recorded
as a CUDA graph, which later runs replay; the first run does the work that must not happen during a recording.
TensorRT-RTX compiles kernels for new shapes in the background and knows when a recording pays, so it records by itself.
Sources: TensorRT, "Working with CUDA Graphs" and "Dynamic Shapes"; TensorRT-RTX, "Working with RTX CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from cpcompile.bundle.reader import Variant
from cpcompile.core.cache import PRESENT, complete
from cpcompile.core.errors import CpcompileError, UsageError, first_line
from cpcompile.core.types import Array, Feeds
from cpcompile.machine.gpu import NO_GPU, gpu_model
from cpcompile.runtime.engine import DOCTOR
from cpcompile.targets.plan_info import PlanInfo, Profile, Shape, Shapes
from cpcompile.targets.requests import TENSORRT_RTX
from cpcompile.targets.tensorrt_library import load_library, logger_of

TYPES: Mapping[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
"""The torch types by the names of TensorRT's DataType."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a plan."""

    name: str
    dtype: torch.dtype
    is_input: bool


def why_not_here(variant: Variant) -> str | None:
    """The reason why the plan of `variant` cannot run on this machine; None if no obstacle is known."""
    assert variant.plan is not None
    if gpu_model() is None:
        return NO_GPU
    if not torch.cuda.is_available():
        return f"torch finds no GPU (it is {torch.__version__}); {DOCTOR}"
    try:
        _fitting_library(variant.model, variant.plan)
    except UsageError as error:
        return str(error)
    return None


def load_plan(variant: Variant) -> PlanEngine:
    """Load the plan of `variant`, whose files have been verified.

    UsageError: no library, or the plan needs another version or other GPUs. CpcompileError: it cannot be loaded.
    """
    assert variant.plan is not None
    if not torch.cuda.is_available():
        raise CpcompileError(f"{variant.model}: torch finds no GPU; {DOCTOR}")
    library = _fitting_library(variant.model, variant.plan)
    with logger_of(library).listening() as messages:
        runtime = library.Runtime(logger_of(library))
        engine = runtime.deserialize_cuda_engine(variant.model.read_bytes())
        context = None if engine is None else _context(library, engine, variant.plan)
    if context is None:
        reason = messages[0] if messages else "it gives no reason"
        raise CpcompileError(
            f"{variant.model}: {library.__name__} {library.__version__} cannot load it ({reason}); build it again on "
            f"this machine: cpcompile build MODEL {variant.plan.rebuild}"
        )
    return PlanEngine(variant.model, variant.plan, library, engine, context)


class PlanEngine:
    """A loaded plan. It has one set of buffers, so it runs once at a time and other threads wait."""

    def __init__(self, plan: Path, info: PlanInfo, library: Any, engine: Any, context: Any) -> None:
        self._plan = plan
        self._info = info
        self._library = library
        self._context = context
        self._graphs = info.flavour != TENSORRT_RTX
        self._tensors = _tensors(plan, library, engine)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # on the default stream TensorRT synchronises after each run
        self._lock = Lock()
        self._shapes: dict[str, Shape] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._runs = 0

    def outputs(self, feeds: Feeds) -> dict[str, Array]:
        """Every output by name, for `feeds`: the inputs by name. bfloat16, which numpy lacks, becomes float32.

        What belongs to the cache of a language model may be left out, as in `Engine.outputs`, and is not among the
        outputs: the tokens then follow no others.
        """
        with self._lock, torch.cuda.stream(self._stream):
            self._take(feeds)
            self._run()
            outputs = [each for each in self._tensors if not each.is_input and not PRESENT.fullmatch(each.name)]
            return {tensor.name: _to_numpy(self._buffers[tensor.name], self._shapes[tensor.name]) for tensor in outputs}

    def milliseconds(self, feeds: Feeds, *, runs: int) -> tuple[float, ...]:
        """GPU time of each of `runs` runs, by CUDA events; `feeds` are copied to the GPU before, untimed."""
        with self._lock, torch.cuda.stream(self._stream):
            self._take(feeds)
            for _ in range(3):  # plain, recorded, replayed
                self._run()
            times = []
            for _ in range(runs):
                start, end = _event(), _event()
                start.record()
                self._run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
        return tuple(times)

    def _take(self, feeds: Feeds) -> None:
        """Copy `feeds` into the buffers on the GPU."""
        inputs = {tensor.name: tensor for tensor in self._tensors if tensor.is_input}
        feeds = complete(feeds, {tensor.name: tensor.shape for tensor in self._info.tensors if tensor.is_input})
        if feeds.keys() != inputs.keys():
            raise UsageError(
                f"{self._plan}: its inputs are {', '.join(inputs)}; {', '.join(feeds) or 'none'} were given"
            )
        arrays = {name: torch.from_numpy(np.array(array, order="C")) for name, array in feeds.items()}
        for name, array in arrays.items():
            if array.dtype != inputs[name].dtype:
                raise UsageError(f"{self._plan}: {name} is {array.dtype}; {inputs[name].dtype} is needed")
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        if any(self._shapes.get(name) != shape for name, shape in shapes.items()):
            self._bind(shapes)
        for name, array in arrays.items():
            _view(self._buffers[name], shapes[name]).copy_(array)

    def _bind(self, shapes: Mapping[str, Shape]) -> None:
        """Choose the profile, set the input shapes, and allocate and set every buffer."""
        self._graph, self._runs, self._shapes = None, 0, {}
        index = choose_profile(self._plan, self._info.profiles, shapes)
        context, stream = self._context, self._stream.cuda_stream
        there = index == context.active_optimization_profile or context.set_optimization_profile_async(index, stream)
        taken = [context.set_input_shape(name, shape) for name, shape in shapes.items()]
        if not there or not all(taken) or context.infer_shapes():
            raise CpcompileError(f"{self._plan}: {self._library.__name__} refuses the shapes {dict(shapes)}")
        found = {tensor.name: tuple(context.get_tensor_shape(tensor.name)) for tensor in self._tensors}
        if unknown := [name for name, shape in found.items() if any(length < 0 for length in shape)]:
            raise CpcompileError(
                f"{self._plan}: the shape of {unknown[0]} depends on values; make it fixed in the model"
            )
        for tensor in self._tensors:
            # An empty tensor needs an address too, which torch would not give it.
            elements = max(1, int(np.prod(found[tensor.name], dtype=np.int64)))
            self._buffers[tensor.name] = torch.empty(elements, dtype=tensor.dtype, device="cuda")
            context.set_tensor_address(tensor.name, self._buffers[tensor.name].data_ptr())
        self._shapes = found

    def _run(self) -> None:
        self._runs += 1
        if self._graph is None and self._graphs and self._runs > 1:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    self._execute()
            except RuntimeError as error:
                raise CpcompileError(
                    f"{self._plan}: cannot be recorded as a CUDA graph: {first_line(error)}"
                ) from error
            self._graph = graph
        if self._graph is not None:
            self._graph.replay()
        else:
            self._execute()

    def _execute(self) -> None:
        with logger_of(self._library).listening() as messages:
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                reason = messages[0] if messages else "it gives no reason"
                raise CpcompileError(f"{self._plan}: {self._library.__name__} cannot run it: {reason}")


def choose_profile(plan: Path, profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """The first profile that accepts every shape; UsageError says which shapes an input may have."""
    for index, profile in enumerate(profiles):
        if all(_admits(profile.shapes[name], shape) for name, shape in shapes.items()):
            return index
    for name, shape in shapes.items():
        if not any(_admits(profile.shapes[name], shape) for profile in profiles):
            ranges = " or ".join("{0} to {2}".format(*profile.shapes[name]) for profile in profiles)
            raise UsageError(
                f"{plan}: {name} is {shape}; the engine takes {ranges}. Build it again with other ranges: --profile"
            )
    raise UsageError(f"{plan}: no profile of the engine takes the shapes {dict(shapes)} together")


def why_not_taken(variant: Variant, feeds: Feeds) -> str | None:
    """The reason why no profile of a plan accepts `feeds`; None if one does, or if the engine is not a plan."""
    if not variant.plan:
        return None
    try:
        choose_profile(variant.model, variant.plan.profiles, {name: array.shape for name, array in feeds.items()})
    except UsageError as error:
        return str(error)
    return None


def _admits(allowed: Shapes, shape: Shape) -> bool:
    low, _, high = allowed
    return len(shape) == len(low) and all(a <= length <= b for a, length, b in zip(low, shape, high, strict=True))


def _fitting_library(plan: Path, info: PlanInfo) -> Any:
    """The library for `plan`; UsageError unless its version, and the GPU that torch uses, fit the plan."""
    library = load_library(info.flavour)
    info.require_fit(
        plan, version=str(library.__version__), capability="sm{}{}".format(*torch.cuda.get_device_capability())
    )
    return library


def _context(library: Any, engine: Any, info: PlanInfo) -> Any:
    """An execution context; TensorRT-RTX is told to record CUDA graphs by itself."""
    if info.flavour != TENSORRT_RTX:
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config)


def _tensors(plan: Path, library: Any, engine: Any) -> tuple[Tensor, ...]:
    found = []
    for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
        dtype, is_input = engine.get_tensor_dtype(name), engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
        if dtype.name not in TYPES:
            raise CpcompileError(f"{plan}: {name} is {dtype.name}, which has no counterpart here")
        found.append(Tensor(name, TYPES[dtype.name], is_input))
    return tuple(found)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _view(buffer: torch.Tensor, shape: Shape) -> torch.Tensor:
    return buffer[: int(np.prod(shape, dtype=np.int64))].view(shape)


def _to_numpy(buffer: torch.Tensor, shape: Shape) -> Array:
    tensor = _view(buffer, shape)
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    return array

"""TensorRT 10, 11 and TensorRT-RTX: a frozen graph -> `tensorrt-rtx-fp16/engine.plan`.

    graph -> ONNX file, its weights beside it -> parser -> network of the graph's own types -> builder -> plan

It uses what the three libraries have in common: the precision is that of the graph, TF32 is off, and shapes are ranges
of profiles. One TensorRT-RTX plan serves all its compute capabilities: kernels are finished on the GPU, and the plan
for three is 8 bytes larger than that for one. The library is imported when it is needed, and its messages come through
one logger per process, since only the first counts. (An IErrorRecorder crashes at exit.)
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from cpcompile.bundle.artifact import Artifact
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.rounding import QUANTIZED
from cpcompile.files.onnx_file import module_of
from cpcompile.files.whole_files import cache_folder, file_digest, whole_file
from cpcompile.targets.plan_info import PlanInfo, Profile, Shapes, TensorInfo
from cpcompile.targets.requests import TENSORRT, Range, Target
from cpcompile.targets.tensorrt_library import load_library, logger_of

StepProgress = Callable[[int, int], None]
"""A callback with the steps done and the total steps."""
PLAN_FILE = "engine.plan"
BATCH = Range(1, 1, 8)
SEQUENCES = ("sequence", "seq", "sequence_length", "seq_len")
"""The names that exporters give to the token axis."""
PAST = "past"
"""The prefix of the inputs that hold the cache, and of its axis."""
TOTAL = "total"
"""The prefix of the axis of past and new tokens together, as masks have it."""
LONGEST = 400
"""The most characters of a library's message that an error repeats."""


def variant_name(target: Target, precision: str) -> str:
    """The name of a variant: runtime and precision."""
    return f"{target.flavour}-{precision}"


def export_tensorrt(
    model: ir.Model,
    folder: Path,
    *,
    target: Target,
    precision: str,
    ranges: Mapping[str, Range],
    sequence: int | None,
    progress: StepProgress = lambda _done, _total: None,
) -> Artifact:
    """Write the plan of `model` to `folder`; it computes in the graph's own types, which `precision` names.

    ranges: lengths of dynamic axes by name. sequence: the trained sequence length, for token axes without a range.
    UsageError: no library, an unknown capability or axis. CpcompileError: the library refuses the graph.
    """
    library = require_target(target)
    profiles = profiles_of(model, ranges, sequence)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:
        onnx = Path(scratch) / "model.onnx"
        ir.save(model, onnx, external_data="weights.bin")
        digest = _digest(sorted(Path(scratch).iterdir()))
        modules = {node.name: module_of(node) for node in model.graph.all_nodes() if node.name}
        build_plan(onnx, folder / PLAN_FILE, library, target, profiles, modules=modules, progress=progress)
    info = PlanInfo(
        flavour=target.flavour,
        version=str(library.__version__),
        capabilities=target.capabilities,
        precision=precision,
        profiles=profiles,
        tensors=tuple(_tensors(model)),
        onnx_digest=digest,
        rounded=tuple(json.loads(model.metadata_props.get(QUANTIZED, "{}"))),
    )
    return Artifact(
        variant=variant_name(target, precision),
        runtime=target.flavour,
        precision=precision,
        provider="",
        device="gpu",
        model_file=PLAN_FILE,
        files=(PLAN_FILE,),
        shared_bytes=0,
        plan=info,
    )


def require_target(target: Target) -> Any:
    """The library of `target`; UsageError if it is missing, or does not build for one of the capabilities."""
    library = load_library(target.flavour)
    known = library.ComputeCapability.__members__ if target.capabilities else {}
    for name in target.capabilities:
        if name.upper() not in known:
            there = ", ".join(each.lower() for each in known if each.startswith("SM"))
            raise UsageError(f"{target.flavour} {library.__version__} does not build for {name}; it builds for {there}")
    return library


def build_plan(
    onnx: Path,
    plan: Path,
    library: Any,
    target: Target,
    profiles: Sequence[Profile],
    *,
    modules: Mapping[str, str] = {},
    progress: StepProgress = lambda _done, _total: None,
) -> None:
    """Build `plan` from the file `onnx`; it appears whole or not at all, and Ctrl-C stops the build at the next step.

    modules: the torch module of each node, for messages.
    """
    log = logger_of(library)
    say = _Speaker(f"{library.__name__} {library.__version__}", modules)
    with log.listening() as messages:
        try:
            builder = library.Builder(log)
        except Exception as error:  # pybind11 has its own class for "returned nullptr"
            raise say.failure("cannot create a builder on this machine", messages or [str(error)]) from error
        network = builder.create_network(_typed(library))
        _parse(library, network, onnx, log, say, messages)
        config = builder.create_builder_config()
        config.clear_flag(library.BuilderFlag.TF32)
        _set_capabilities(library, config, target)
        _add_profiles(builder, network, config, profiles, say, messages)
        timings = cache_folder() / f"timings-{library.__version__}" if target.flavour == TENSORRT else None
        with timing_cache(config, timings), whole_file(plan) as temporary, temporary.open("wb") as file:
            writer, monitor = _writer(library, file), _monitor(library, progress)
            config.progress_monitor = monitor
            built = _run(lambda: builder.build_serialized_network_to_stream(network, config, writer), monitor)
            for failure in (writer.error, monitor.error):
                if failure is not None:
                    raise failure
            if not built or not file.tell():
                raise say.failure("cannot build the engine", messages)


@contextmanager
def timing_cache(config: Any, path: Path | None) -> Iterator[None]:
    """Use the kernel timings of earlier builds from `path`, and add those of this one; None if nothing is timed.

    The timings of another version or GPU are ignored; without a cache the build only takes longer.
    """
    if path is None:
        yield
        return
    known = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(known) or config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    yield
    with suppress(CpcompileError), whole_file(path) as temporary:
        temporary.write_bytes(config.get_timing_cache().serialize())


def profiles_of(model: ir.Model, ranges: Mapping[str, Range], sequence: int | None) -> tuple[Profile, ...]:
    """One profile, or with a cache one for the prompt (no past) and one for the tokens after it (one at a time).

    UsageError: a range for an axis that does not exist, or an axis without a known range.
    """
    axes = {name: None for value in model.graph.inputs for name in _shape(value) if isinstance(name, str)}
    if unknown := sorted(ranges.keys() - axes.keys()):
        there = f"the dynamic axes are {', '.join(axes)}" if axes else "no axis is dynamic"
        raise UsageError(f"--profile {unknown[0]}: the inputs have no such axis; {there}")
    usual = {axis: _usual(axis, sequence) for axis in axes}
    known = {axis: found for axis, found in usual.items() if found is not None} | dict(ranges)
    if open_axes := [axis for axis in axes if axis not in known]:
        raise UsageError(f"the axis {open_axes[0]!r} has no usual range; give --profile {open_axes[0]}=min:opt:max")
    beside_cache = {n for v in model.graph.inputs if not _is_cache(v) for n in _shape(v)}
    past = [axis for axis in axes if axis not in beside_cache]
    if not past:
        return (_profile("default", model, known),)
    new = [axis for axis in axes if axis in SEQUENCES]
    whole = [axis for axis in axes if axis.startswith(TOTAL) and axis not in ranges]
    fresh = known | dict.fromkeys(past, Range(0, 0, 0)) | {axis: known[new[0]] for axis in whole if new}
    before = known[past[0]]
    after = Range(before.min + 1, before.opt + 1, before.max + 1)
    step = known | dict.fromkeys(new, Range(1, 1, 1)) | dict.fromkeys(whole, after)
    return _profile("prefill", model, fresh), _profile("decode", model, step)


def _usual(axis: str, sequence: int | None) -> Range | None:
    if "batch" in axis:
        return BATCH
    tokens = axis in SEQUENCES or axis.startswith((PAST, TOTAL))
    return Range(1, sequence, 4 * sequence) if tokens and sequence else None


def _profile(name: str, model: ir.Model, known: Mapping[str, Range]) -> Profile:
    shapes: dict[str, Shapes] = {}
    for value in model.graph.inputs:
        ranges = [known[axis] if isinstance(axis, str) else Range(axis, axis, axis) for axis in _shape(value)]
        low, best, high = (tuple(getattr(each, end) for each in ranges) for end in ("min", "opt", "max"))
        shapes[value.name or ""] = (low, best, high)
    return Profile(name=name, shapes=shapes)


def _shape(value: ir.Value) -> list[int | str]:
    if value.shape is None or value.shape.has_unknown_dim():
        raise UsageError(f"the input {value.name}: an axis has neither a length nor a name; export it with names")
    return [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape]


def _is_cache(value: ir.Value) -> bool:
    return (value.name or "").startswith(PAST)


def _tensors(model: ir.Model) -> Iterator[TensorInfo]:
    for values, is_input in ((model.graph.inputs, True), (model.graph.outputs, False)):
        for value in values:
            assert value.name is not None and value.dtype is not None and value.shape is not None
            shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
            yield TensorInfo(name=value.name, is_input=is_input, dtype=str(value.dtype.numpy()), shape=shape)


def _digest(files: Iterable[Path]) -> str:
    return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()


def _typed(library: Any) -> int:
    """The flags for strong typing, which is a flag in TensorRT 10 and the only mode of TensorRT 11 and TensorRT-RTX."""
    strong = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if strong is None else 1 << int(strong)


def _parse(library: Any, network: Any, onnx: Path, log: Any, say: _Speaker, messages: list[str]) -> None:
    """Read the file into `network`, by its path because weights beside it cannot be found from bytes."""
    parser = library.OnnxParser(network, log)
    parsed = parser.parse_from_file(str(onnx))
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if errors and errors[0].node_operator():
        first = errors[0]
        raise say.failure(f"cannot read {say.place(first.node_operator(), first.node_name())}", [first.desc()])
    if errors or not parsed or not network.num_outputs:  # it may claim to have parsed what is not ONNX
        reasons = [*messages, *(error.desc() for error in errors), "it is damaged or not ONNX"]
        raise say.failure(f"cannot read {onnx.name}", reasons, way_out="export it again, with its weights beside it")
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == getattr(library.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = library.IAttentionInputLayer  # the bindings return every layer as an ILayer
            layer.attention.decomposable = True  # float32 has no fused kernel and would be refused


def _set_capabilities(library: Any, config: Any, target: Target) -> None:
    if target.capabilities:  # TensorRT builds for the GPU in the machine and has no such setting
        config.num_compute_capabilities = len(target.capabilities)
    for index, name in enumerate(target.capabilities):
        config.set_compute_capability(library.ComputeCapability.__members__[name.upper()], index)


def _add_profiles(
    builder: Any, network: Any, config: Any, profiles: Sequence[Profile], say: _Speaker, messages: list[str]
) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for profile in profiles:
        own = builder.create_optimization_profile()
        for tensor in inputs:
            if tensor.is_shape_tensor:
                reason = f"the values of the input {tensor.name} determine shapes; make it a constant of the model"
                raise say.failure("cannot build the engine", [reason])
            shapes = profile.shapes.get(tensor.name)
            if shapes is None or len(shapes[0]) != len(tensor.shape):
                reason = (
                    f"the profile {profile.name} has {shapes} for the input {tensor.name} of {len(tensor.shape)} axes"
                )
                raise say.failure("cannot build the engine", [reason])
            try:
                own.set_shape(tensor.name, *shapes)
            except Exception as error:
                reason = f"the profile {profile.name} for {tensor.name}: {error}"
                raise say.failure("cannot build the engine", [*messages, reason]) from error
        if config.add_optimization_profile(own) < 0:
            raise say.failure(f"refuses the profile {profile.name}", messages)


def _run(build: Callable[[], Any], monitor: Any) -> Any:
    """Run `build`, which releases the interpreter lock, in a thread, so that Ctrl-C arrives here meanwhile."""
    with ThreadPoolExecutor(1, "tensorrt") as pool:
        future = pool.submit(build)
        try:
            return future.result()
        finally:
            monitor.cancelled = True  # has no effect on a build that has ended


@dataclass(frozen=True)
class _Speaker:
    """Turns the messages of a library into one sentence."""

    library: str
    modules: Mapping[str, str]

    def place(self, operator: str, name: str) -> str:
        module = self.modules.get(name, "")
        return f"{operator} {name}".strip() + (f" (module {module})" if module else "")

    def failure(
        self, what: str, messages: Sequence[str], way_out: str = "change the model there, or leave this target out"
    ) -> CpcompileError:
        text = " ".join((messages[0] if messages else "it gives no reason").split())
        text = re.sub(r"^(.*?Error Code \d+: (Myelin \(|API Usage Error \()?|\w+\.cpp:\d+: (ERROR: )?)", "", text)
        text = text[:LONGEST].rstrip(" .")
        named = [name for name in re.findall(r"[\w./:-]+", text) if self.modules.get(name)]
        where = f" (node {named[0]}, module {self.modules[named[0]]})" if named else ""
        return CpcompileError(f"{self.library} {what}: {text}{where}; {way_out}")


def _writer(library: Any, file: BinaryIO) -> Any:
    class Writer(library.IStreamWriter):  # type: ignore[misc]
        """Writes to `file`; keeps an exception, which must not pass through the library."""

        def __init__(self) -> None:
            library.IStreamWriter.__init__(self)
            self.error: BaseException | None = None

        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except BaseException as error:
                self.error = error
                return 0

    return Writer()


def _monitor(library: Any, progress: StepProgress) -> Any:
    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        """Reports the steps of the outermost phase, and stops the build once `cancelled` is set."""

        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.cancelled = False
            self.error: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[name] = steps

        def phase_finish(self, name: str) -> None:
            self._steps.pop(name, None)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                if name in self._steps:
                    progress(step + 1, self._steps[name])
            except BaseException as error:
                self.error, self.cancelled = error, True
            return not self.cancelled

    return Monitor()

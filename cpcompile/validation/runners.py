"""Everything that runs a model, behind one protocol: a context manager that loads and frees it.

    with runner.load() as run:
        outputs = run(feeds)

    engine_runner      an engine of the bundle: in ONNX Runtime on its own provider and no other, in OpenVINO, or a plan
    onnx_runner        any ONNX file in ONNX Runtime on the CPU; the dynamic graph with its context bound
    openvino_runner    any ONNX file in OpenVINO on the CPU
    callable_runner    an eager model, or one that torch.compile made

A runner that cannot be loaded here raises CpcompileError, which says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from cpcompile.bundle.reader import Variant
from cpcompile.core.cache import PRESENT, complete
from cpcompile.core.errors import CpcompileError
from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Feeds
from cpcompile.runtime.engine import Engine, create_session, session_options
from cpcompile.runtime.openvino_session import load_session, open_session
from cpcompile.runtime.plan import load_plan
from cpcompile.targets.requests import OPENVINO
from cpcompile.validation.reference import Outputs, Run

NO_SPINNING_AFTER_RUN: Mapping[str, str] = {"session.force_spinning_stop": "1"}
"""Session options of ONNX Runtime for an engine that is timed along with another runtime, see `speed`."""

Computes = Literal["context", "dense"]


@dataclass(frozen=True)
class Runner:
    """A model that can be loaded; `computes` says which one it is: that of the context, or the dense one."""

    name: str
    computes: Computes
    load: Callable[[], AbstractContextManager[Run]]


def engine_runner(variant: Variant, *, threads: int, workers: int = 1) -> Runner:
    """An engine of a bundle, for so many `workers` at the same time; its files have been verified."""

    @contextmanager
    def load() -> Iterator[Run]:
        if variant.plan:
            yield load_plan(variant).outputs
            return
        if variant.runtime == OPENVINO:
            yield Engine(variant, load_session(variant, threads=threads, streams=workers)).outputs
            return
        options = _without_spinning(session_options(variant, threads=threads))
        yield Engine(variant, create_session(variant, options)).outputs

    return Runner(variant.name, "context", load)


def onnx_runner(
    name: str, path: Path, *, threads: int, computes: Computes, bound: Mapping[str, int] | None = None
) -> Runner:
    """The ONNX file `path`; `bound` are inputs that stay the same, such as the context."""

    @contextmanager
    def load() -> Iterator[Run]:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        try:
            session = ort.InferenceSession(path, _without_spinning(options), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no common error class
            raise CpcompileError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {error}") from error
        yield _completed(session, {key: np.asarray(number) for key, number in (bound or {}).items()})

    return Runner(name, computes, load)


def openvino_runner(name: str, path: Path, *, threads: int, computes: Computes) -> Runner:
    """The ONNX file `path` in OpenVINO, in float32 as everything else here."""

    @contextmanager
    def load() -> Iterator[Run]:
        yield _completed(open_session(path, path.parent, "fp32", threads=threads))

    return Runner(name, computes, load)


def callable_runner(name: str, computes: Computes, make: Callable[[], Run | NotMeasured]) -> Runner:
    """The result of `make`, or CpcompileError with the reason that it returns instead."""

    @contextmanager
    def load() -> Iterator[Run]:
        run = make()
        if isinstance(run, NotMeasured):
            raise CpcompileError(run.reason)
        yield run

    return Runner(name, computes, load)


def _without_spinning(options: ort.SessionOptions) -> ort.SessionOptions:
    for key, value in NO_SPINNING_AFTER_RUN.items():
        options.add_session_config_entry(key, value)
    return options


def _completed(session: Any, constants: Feeds = MappingProxyType({})) -> Run:
    """Runs of `session` without a cache: neither among the inputs nor among the outputs."""
    names = [output.name for output in session.get_outputs() if not PRESENT.fullmatch(output.name)]
    shapes = {each.name: each.shape for each in session.get_inputs()}

    def run(feeds: Feeds) -> Outputs:
        return dict(zip(names, session.run(names, {**complete(feeds, shapes), **constants}), strict=True))

    return run

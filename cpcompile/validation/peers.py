"""Peers: alternatives to an engine of a bundle, timed along with it.

    onnx-dense      the dense baseline as one plain export in ONNX Runtime; the one that is timed by default
    torch-compile   the dense baseline through torch.compile
    onnx-dynamic    the graph of all contexts in ONNX Runtime, with the context as an input: any context, full cost
    openvino        the graph of the engine in OpenVINO, in the operators of the standard

Graphs are made for the first engine that needs them, and shared by all. Peers run on the CPU, so engines for GPUs have
none; an engine of all contexts has only those that compute the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from cpcompile.bundle.reader import Variant
from cpcompile.core.config import DENSE_PEER, OPSETS, ValidateConfig
from cpcompile.core.errors import CpcompileError
from cpcompile.files.whole_files import scratch_folder
from cpcompile.frontend.source import Source
from cpcompile.machine.environment import available_cores
from cpcompile.validation.diagnosis import Graphs
from cpcompile.validation.reference import Reference, Run
from cpcompile.validation.runners import Computes, Runner, callable_runner, onnx_runner, openvino_runner

DENSE = (DENSE_PEER, "torch-compile")


@contextmanager
def open_peers(config: ValidateConfig, source: Source, reference: Reference, graphs: Graphs) -> Iterator[Peers]:
    """The peers that `config` names of the engines that `source` was built into; their files are temporary.

    graphs: those that the engines were made from.
    """
    with scratch_folder("peers") as folder:
        yield Peers(config.peers, source, reference, graphs, folder, config.threads or available_cores())


class Peers:
    """For each engine its runners, in the order of `names`; graphs go to `folder`."""

    def __init__(
        self,
        names: Sequence[str],
        source: Source,
        reference: Reference,
        graphs: Graphs,
        folder: Path,
        threads: int,
    ) -> None:
        self._names = names
        self._source = source
        self._reference = reference
        self._graphs = graphs
        self._folder = folder
        self._threads = threads

    def __call__(self, variant: Variant) -> tuple[Runner, ...]:
        if not variant.on_cpu:
            return ()
        makers: dict[str, Callable[[Variant], Runner]] = {
            DENSE_PEER: self._dense_graph,
            "torch-compile": self._compiled,
            "onnx-dynamic": self._dynamic_graph,
            "openvino": self._openvino,
        }
        return tuple(makers[name](variant) for name in self._names if name in DENSE or not variant.feeds)

    def _compiled(self, variant: Variant) -> Runner:
        return callable_runner("torch-compile", "dense", lambda: self._reference.compiled(variant.context))

    def _dense_graph(self, variant: Variant) -> Runner:
        return self._onnx(DENSE_PEER, variant, "dense", lambda: self._dense_file)

    def _dynamic_graph(self, variant: Variant) -> Runner:
        index = self._source.contexts.index(variant.context)
        return self._onnx("onnx-dynamic", variant, "context", lambda: self._dynamic_file, context=index)

    def _openvino(self, variant: Variant) -> Runner:
        name = f"{variant.context}.{variant.name}.onnx"
        runner = openvino_runner("openvino", self._folder / name, threads=self._threads, computes="context")

        @contextmanager
        def load() -> Iterator[Run]:
            # Not the engine's own file: OpenVINO computes ONNX Runtime's operator of attention wrong.
            path = self._save(self._graphs.frozen(variant.context, OPSETS[-1]), name)
            try:
                with runner.load() as run:
                    yield run
            finally:
                path.unlink()
                path.with_name(f"{name}.data").unlink(missing_ok=True)

        return Runner(runner.name, runner.computes, load)

    def _onnx(
        self, name: str, variant: Variant, computes: Computes, path: Callable[[], Path | None], **bound: int
    ) -> Runner:
        @contextmanager
        def load() -> Iterator[Run]:
            file = path()
            if file is None:
                raise CpcompileError("there is no dense baseline beside the model; the peer onnx-dynamic needs none")
            with onnx_runner(name, file, threads=self._threads, computes=computes, bound=bound).load() as run:
                yield self._reference.as_engine(variant.context, run, all_logits=computes == "dense")

        return Runner(name, computes, load)

    @cached_property
    def _dense_file(self) -> Path | None:
        graph = self._source.capture_dense(opset=OPSETS[-1])
        return self._save(graph, "dense.onnx") if graph is not None else None

    @cached_property
    def _dynamic_file(self) -> Path:
        return self._save(self._source.capture(opset=OPSETS[-1]), "dynamic.onnx")

    def _save(self, graph: ir.Model, name: str) -> Path:
        path = self._folder / name
        ir.save(graph, path, external_data=f"{name}.data")
        return path

"""Run the engines of a bundle with ONNX Runtime, without torch and without experimental APIs.

bundle = open_bundle(Path("model.cpc"))
engine = load_engine(bundle, "english")
logits = engine.run(input_ids)
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from cpcompile.bundle.reader import WEIGHTS_OPTION, Bundle, Variant
from cpcompile.core.errors import CpcompileError, UsageError, first_line
from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Array, Feeds

PLUGINS: Mapping[str, str] = {"NvTensorRTRTXExecutionProvider": "onnxruntime_ep_nv_tensorrt_rtx"}
"""Execution providers that come in packages of their own, which the standard onnxruntime loads."""
CPU_PROVIDER = "CPUExecutionProvider"
DOCTOR = "`cpcompile doctor` says what this machine lacks"


@dataclass(frozen=True)
class Engine:
    """A loaded engine; `session` is an ordinary onnxruntime.InferenceSession."""

    variant: Variant
    session: Any

    def run(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits (batch, sequence, vocabulary) of input_ids (batch, sequence)."""
        if input_ids.ndim != 2 or input_ids.dtype != np.int64:
            raise UsageError(
                f"input_ids is {input_ids.dtype} of shape {input_ids.shape}; int64 (batch, sequence) is needed"
            )
        (logits,) = self._run(["logits"], {"input_ids": input_ids})
        result: npt.NDArray[np.float32] = logits
        return result

    def outputs(self, feeds: Feeds) -> dict[str, Array]:
        """Every output of the graph by name, for `feeds`: the inputs by name, without the context."""
        return dict(zip(self._names, self._run(self._names, feeds), strict=True))

    @cached_property
    def _names(self) -> list[str]:
        return [output.name for output in self.session.get_outputs()]

    def _run(self, names: list[str], feeds: Feeds) -> list[Array]:
        """Run the session with the input that selects the context, where the engine serves several."""
        chosen = {name: np.asarray(number) for name, number in self.variant.feeds.items()}
        try:
            outputs: list[Array] = self.session.run(names, {**feeds, **chosen})
        except Exception as error:  # as in `create_session`
            raise CpcompileError(
                f"{self.variant.model}: ONNX Runtime {ort.__version__} cannot run it on these inputs: {error}"
            ) from error
        return outputs

    def generate(self, prompt: list[int], *, tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[int]:
        """Continue `prompt` by `tokens` ids: the most likely ones, or samples if `temperature` > 0."""
        generator = np.random.default_rng(seed)
        ids = list(prompt)
        for _ in range(tokens):
            logits = self.run(np.asarray([ids], dtype=np.int64))[0, -1].astype(np.float64)
            if temperature > 0:
                noise = generator.gumbel(size=logits.shape)
                logits = logits / temperature + noise
            ids.append(int(logits.argmax()))
            yield ids[-1]


def load_engine(bundle: Bundle, context: str, variant: str = "cpu-fp32", *, threads: int = 0) -> Engine:
    """Verify and load one engine; `threads` 0 leaves the number to ONNX Runtime.

    UsageError: no such context or variant, a damaged or missing file, a reference to a file that is not its own.
    CpcompileError: ONNX Runtime refuses the model, or falls back to another provider.

    ONNX Runtime parses the graph in this process. A graph from a stranger can take any amount of time and memory, so
    load it where that does no harm.
    """
    chosen = bundle.variant(context, variant)
    if chosen.plan:
        raise UsageError(f"{chosen.model}: is a plan of {chosen.runtime}, which ONNX Runtime does not run")
    bundle.verify_engine(chosen)
    return Engine(chosen, create_session(chosen, session_options(chosen, threads=threads)))


def session_options(variant: Variant, *, threads: int = 0) -> Any:
    """onnxruntime.SessionOptions with what the bundle records for `variant`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for key, value in variant.session_options.items():
        options.add_session_config_entry(key, value)
    if variant.weights is not None:
        options.add_session_config_entry(WEIGHTS_OPTION, str(variant.weights.resolve()))
    return options


def create_session(variant: Variant, options: Any) -> Any:
    """An InferenceSession on the provider of `variant` alone; by itself ONNX Runtime would fall back to another."""
    chosen = _choose_provider(variant, options)
    try:
        session = ort.InferenceSession(variant.model, options, providers=chosen, enable_fallback=0)
    except Exception as error:  # onnxruntime has one class per status code, without a common base
        reason = f"{str(error).strip()}{_hint(variant)}"
        raise CpcompileError(f"{variant.model}: ONNX Runtime {ort.__version__} cannot load it: {reason}") from error
    if session.get_providers()[0] != variant.provider:
        raise CpcompileError(
            f"{variant.model}: needs {variant.provider}, ONNX Runtime fell back to {session.get_providers()[0]}"
            f"{_hint(variant)}"
        )
    return session


def missing_provider(variant: Variant) -> str | None:
    """The reason why the execution provider of `variant` is not available; None if it is."""
    if variant.provider in ort.get_available_providers():
        return None
    devices = plugin_devices(variant.provider)
    return f"needs {variant.provider}; {devices}" if isinstance(devices, NotMeasured) else None


def _hint(variant: Variant) -> str:
    """A hint at the doctor; on the CPU provider the model itself is at fault."""
    return "" if variant.provider == CPU_PROVIDER else f"; {DOCTOR}"


def _choose_provider(variant: Variant, options: Any) -> list[tuple[str, dict[str, str]]] | None:
    """The `providers` of the InferenceSession; None where `options` get the devices of a packaged provider instead.

    Source: ONNX Runtime, docs/execution-providers/plugin-ep-libraries.
    """
    name, settings = variant.provider, dict(variant.provider_options)
    if name in ort.get_available_providers():
        if name != CPU_PROVIDER:
            with redirect_stdout(io.StringIO()):  # it prints what is missing, which the session reports anyway
                ort.preload_dlls()  # CUDA from NVIDIA's packages, which are not on the library path
        return [(name, settings)]
    devices = plugin_devices(name)
    if isinstance(devices, NotMeasured):
        raise CpcompileError(f"{variant.model}: needs {name}; {devices}. {DOCTOR}")
    options.add_provider_for_devices(devices, settings)
    return None


def plugin_devices(provider: str) -> list[Any] | NotMeasured:
    """The devices that a packaged provider finds, or the reason why there are none."""
    if provider not in PLUGINS:
        return NotMeasured(f"this ONNX Runtime {ort.__version__} has {', '.join(ort.get_available_providers())}")
    try:
        plugin: ModuleType = importlib.import_module(PLUGINS[provider])
        if provider not in {device.ep_name for device in ort.get_ep_devices()}:
            ort.register_execution_provider_library(provider, plugin.get_library_path())
    except Exception as error:  # its libraries may be missing or not match this ONNX Runtime
        return NotMeasured(f"its package {PLUGINS[provider]} cannot be loaded ({first_line(error)})")
    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider]
    return devices or NotMeasured("it finds no GPU that it supports")

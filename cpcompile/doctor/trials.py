"""Trials of what metadata cannot tell; each runs in a process of its own, which may fail, crash or hang.

python -m cpcompile.doctor.trials NAME    prints one line of JSON

onnxruntime     a session of two nodes per execution provider, as the runtime opens it
tensorrt(_rtx)  a Builder, and the version
openvino        the same two nodes, compiled for the CPU, and what the CPU computes in
nvidia          driver and GPUs, by NVML
torch-cuda      whether torch finds a GPU
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpcompile.core.errors import CpcompileError, first_line
from cpcompile.core.measured import NotMeasured

SECONDS = 20
"""The time limit of a trial, which usually takes one or two; a loaded machine may need longer."""
TWO_NODES = bytes.fromhex(
    "080a3a450a0e0a01780a017812017322034d756c0a0e0a01730a017812017922034164641201675a0f0a"
    "0178120a0a08080112040a020802620f0a0179120a0a08080112040a02080242040a001014"
)
"""ONNX, opset 20: y = x * x + x for x of shape (2,), float32. As bytes, so that no trial needs the onnx package."""


def run_trial(name: str, *arguments: str, seconds: float = SECONDS) -> dict[str, Any] | NotMeasured:
    """What the trial prints, or why it printed nothing."""
    command = (sys.executable, "-P", "-m", __name__, name, *arguments)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return NotMeasured(f"gave no answer within {seconds:g} s")
    except OSError as error:
        return NotMeasured(f"cannot be tried ({error.strerror})")
    if done.returncode < 0:
        return NotMeasured(f"crashed ({signal.Signals(-done.returncode).name})")
    if done.returncode > 0:
        return NotMeasured((done.stderr.strip() or f"ended with {done.returncode}").rsplit("\n", maxsplit=1)[-1])
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().rsplit("\n", maxsplit=1)[-1])
    except ValueError:  # a package that exits when it is imported
        return NotMeasured("ended without an answer")
    return result


def onnxruntime() -> dict[str, Any]:
    """For each provider that a bundle may name: None if it ran the two nodes, otherwise the reason."""
    import numpy as np
    import onnxruntime as ort

    from cpcompile.bundle.manifest import PROVIDER_OPTIONS
    from cpcompile.bundle.reader import CPU_PROVIDER, Variant
    from cpcompile.runtime.engine import Engine, create_session, session_options

    reasons: dict[str, str | None] = {}
    x = np.asarray([1, 2], dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "two_nodes.onnx"
        model.write_bytes(TWO_NODES)
        for provider in (CPU_PROVIDER, *PROVIDER_OPTIONS):
            variant = Variant(
                context="",
                name="two-nodes",
                runtime="onnxruntime",
                precision="fp32",
                provider=provider,
                model=model,
                weights=None,
                session_options={},
                provider_options={},
                feeds={},
                bytes=len(TWO_NODES),
            )
            try:
                outputs = Engine(variant, create_session(variant, session_options(variant, threads=1))).outputs
                right = np.array_equal(outputs({"x": x})["y"], x * x + x)
                reasons[provider] = None if right else "computes a wrong result"
            except CpcompileError as error:
                reasons[provider] = str(error).removeprefix(f"{model}: ").splitlines()[0]
    return {"version": ort.__version__, "providers": reasons}


def tensorrt(module: str) -> dict[str, Any]:
    """Create a Builder, which needs the whole library."""
    trt: Any = importlib.import_module(module)
    trt.Builder(trt.Logger(trt.Logger.ERROR))
    return {"version": trt.__version__}


def openvino() -> dict[str, Any]:
    """Compile and run the same two nodes."""
    import numpy as np
    import openvino as ov

    core = ov.Core()
    x = np.asarray([1, 2], dtype=np.float32)
    found = core.compile_model(core.read_model(TWO_NODES, b""), "CPU")([x])[0]
    if not np.array_equal(found, x * x + x):
        raise ValueError("computes a wrong result")
    return {"devices": core.available_devices, "capabilities": core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")}


def nvidia() -> dict[str, Any]:
    """Read the driver's version and its GPUs."""
    from cpcompile.machine.gpu import nvidia_gpus

    found = nvidia_gpus()
    if isinstance(found, NotMeasured):
        raise ValueError(found.reason)
    driver, gpus = found
    return {"driver": driver, "gpus": [dataclasses.asdict(gpu) for gpu in gpus]}


def torch_cuda() -> dict[str, Any]:
    """Create a tensor on the first GPU."""
    import torch

    return {"sum": float(torch.ones(2, device="cuda").sum())}


TRIALS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "onnxruntime": onnxruntime,
    "tensorrt": tensorrt,
    "openvino": openvino,
    "nvidia": nvidia,
    "torch-cuda": torch_cuda,
}

if __name__ == "__main__":
    try:
        print(json.dumps(TRIALS[sys.argv[1]](*sys.argv[2:])))
    except Exception as error:  # of any package
        sys.exit(f"{type(error).__name__}: {first_line(error)}")

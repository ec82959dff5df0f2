"""The environment of a measurement: processor, cores, GPU, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpcompile.core.version import __version__
from cpcompile.machine.gpu import gpu_model
from cpcompile.machine.procfs import first_value

PACKAGES = {
    "torch": ("torch",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "numpy": ("numpy",),
}
"""The packages whose versions a report always names, with the distributions that provide them."""
RUNTIMES = {"openvino": ("openvino",), "tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt-rtx",)}
"""Those that it names where they are installed: runtimes of engines that a build adds."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A machine, and the versions of what matters there."""

    cpu: str
    cores: int
    gpu: str | None
    """The first NVIDIA GPU; None if there is none."""
    versions: Mapping[str, str | None]
    """By package; None for one of PACKAGES that is not installed."""


def available_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment() -> Environment:
    """The machine and the versions, as a report states them; no package is imported to find its version."""
    versions: dict[str, str | None] = {name: _version(distributions) for name, distributions in PACKAGES.items()}
    versions |= {name: found for name, own in RUNTIMES.items() if (found := _version(own)) is not None}
    return Environment(
        cpu=_cpu_model(),
        cores=available_cores(),
        gpu=gpu_model(),
        versions={"cpcompile": __version__, "python": platform.python_version(), **versions},
    )


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _cpu_model() -> str:
    return first_value(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()

"""NVIDIA GPUs and their memory, as the driver and its management library (NVML) describe them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cpcompile.core.measured import NotMeasured
from cpcompile.machine.procfs import first_value

NO_GPU = "no NVIDIA GPU"
NO_NVML = "nvidia-ml-py is not installed: pip install 'cpcompile[gpu]'"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it."""

    name: str
    compute_capability: str
    """For example `8.9`."""
    memory_bytes: int


def nvidia_gpus() -> tuple[str, tuple[Gpu, ...]] | NotMeasured:
    """The driver's version and the GPUs in its order, or the reason why they are unknown.

    Source: NVML API reference, nvmlSystemGetDriverVersion, nvmlDeviceGetCudaComputeCapability.
    """
    try:
        import pynvml
    except ImportError:
        return NotMeasured(NO_NVML)
    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(
            Gpu(
                name=pynvml.nvmlDeviceGetName(device),
                compute_capability=".".join(map(str, pynvml.nvmlDeviceGetCudaComputeCapability(device))),
                memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(device).total,
            )
            for device in devices
        )
        return pynvml.nvmlSystemGetDriverVersion(), gpus
    except pynvml.NVMLError as error:
        return NotMeasured(f"NVML: {error}")


def video_memory() -> int | NotMeasured:
    """Bytes that this process holds on NVIDIA GPUs, or the reason why they are unknown.

    Runtimes keep their allocations there until they are closed, so this is also the peak.
    Source: NVML API reference, nvmlDeviceGetComputeRunningProcesses.
    """
    if gpu_model() is None:
        return NotMeasured(NO_GPU)
    try:
        import pynvml
    except ImportError:
        return NotMeasured(NO_NVML)
    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        every = [process for device in devices for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device)]
    except pynvml.NVMLError as error:
        return NotMeasured(f"NVML: {error}")
    own: list[int | None] = [process.usedGpuMemory for process in every if process.pid == os.getpid()]
    known = [size for size in own if size is not None]
    if len(known) < len(own) or (every and not own):  # process ids in a container differ from NVML's
        return NotMeasured("NVML does not say which memory belongs to this process")
    return sum(known)


def gpu_model() -> str | None:
    """The NVIDIA GPU that the driver lists first; None if there is none."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return first_value(cards[0], "Model") if cards else None

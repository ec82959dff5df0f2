"""What a process holds in memory, and what machine it runs on.

    fresh interpreter -> base RSS -> [reset peak] load -> peak -> [reset peak] run -> peak -> one line of JSON

Each side of a comparison gets a process of its own: allocators keep what they once had, so a
second measurement in one process measures the first one too. The peak is VmHWM of
/proc/self/status (proc_pid_status(5)), which belongs to the address space and begins anew with
exec. ru_maxrss of getrusage(2) does not: Linux carries it over exec, so that a small child of a
large process would report its parent's peak. It serves only where there is no /proc.

Resident pages of files, such as libraries and mapped weights, are there once for all processes, and the
system may drop them; private memory is what is left: RssAnon, the pages without a file behind them, what was
allocated or written. It is resident - shared of /proc/self/statm, which is quick to read. (Private_Clean of
smaps_rollup also counts pages of files that nobody else happens to map, and takes 10 ms to sum up.) The kernel keeps no
peak of it: a thread looks every 5 ms, which takes 3 % of a core, and does not see a peak that is shorter.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cpcompile
from cpcompile.core.errors import CpcompileError

T = TypeVar("T")

SAMPLE_SECONDS = 0.005
"""Between two looks at private memory."""
NO_PRIVATE = "this system does not tell private memory apart (there is no /proc/self/statm)"
NO_GPU = "no NVIDIA GPU"
NO_NVML = "nvidia-ml-py is not installed: pip install 'cpcompile[gpu]'"
STATUS = Path("/proc/self/status")
STATM = Path("/proc/self/statm")
CLEAR_REFS = Path("/proc/self/clear_refs")
PROCESSORS = Path("/proc/stat")
MEMINFO = Path("/proc/meminfo")
GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")
PACKAGES = {
    "torch": ("torch",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "numpy": ("numpy",),
}
"""Versions that a report names, and the distributions that provide them."""


@dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """Resident bytes of one process, and what its start took."""

    base_rss_bytes: int
    """The interpreter and its libraries, before anything is loaded."""
    load_peak_rss_bytes: int
    run_peak_rss_bytes: int
    """While running. Where the peak cannot be reset (no /proc/self/clear_refs) it contains that of loading."""
    base_private_bytes: int | None = None
    """Before anything is loaded. None where the system does not tell (NO_PRIVATE)."""
    load_peak_private_bytes: int | None = None
    """Of samples."""
    run_peak_private_bytes: int | None = None
    vram_bytes: int | None = None
    """On the GPUs, after running. None where it cannot be told (`video_memory` says why)."""
    load_ms: float | None = None
    first_run_ms: float | None = None
    """Its files are in the page cache; libraries are imported before."""


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes() -> int:
    """Resident bytes of this process now; without /proc the peak, which is not smaller."""
    return _status_bytes("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that was resident since this process began, or since `reset_peak`."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource  # not on Windows

    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def reset_peak() -> bool:
    """Let the peak begin anew at what is resident now; False where the system does not allow it."""
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def private_bytes() -> int | None:
    """Resident bytes of this process that no file holds; None where the system does not tell."""
    try:
        _, resident, shared, *_ = STATM.read_bytes().split()
    except OSError:
        return None
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class PrivatePeak:
    """The most private memory that was seen while entered; None where the system does not tell."""

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PrivatePeak:
        self._look()
        if self.bytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._thread.is_alive():
            self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._left.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        if (now := private_bytes()) is not None:
            self.bytes = max(self.bytes or 0, now)


def release_memory() -> None:
    """Give back what this process no longer uses: models are freed with their cycles, and glibc keeps what is freed.

    Without it a process that has held something large twice may hold it twice at once. Source: malloc_trim(3).
    """
    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it."""

    name: str
    compute_capability: str
    """Such as `8.9`."""
    memory_bytes: int


def nvidia_gpus() -> tuple[str, tuple[Gpu, ...]] | str:
    """The driver's version and the GPUs in its order, or why they are not known.

    Source: NVML API reference, nvmlSystemGetDriverVersion, nvmlDeviceGetCudaComputeCapability.
    """
    try:
        import pynvml
    except ImportError:
        return NO_NVML
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
        return f"NVML: {error}"


def video_memory() -> int | str:
    """Bytes that this process holds on NVIDIA GPUs, or why that is not known.

    Runtimes keep what they once allocated there until they are closed, so that this is also the peak.
    Source: NVML API reference, nvmlDeviceGetComputeRunningProcesses.
    """
    if gpu_model() is None:
        return NO_GPU
    try:
        import pynvml
    except ImportError:
        return NO_NVML
    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        every = [process for device in devices for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device)]
    except pynvml.NVMLError as error:
        return f"NVML: {error}"
    own: list[int | None] = [process.usedGpuMemory for process in every if process.pid == os.getpid()]
    known = [size for size in own if size is not None]
    if len(known) < len(own) or (every and not own):  # in a container process ids are others than NVML's
        return "NVML does not tell which memory is this process's"
    return sum(known)


def measure_memory(load: Callable[[], T], run: Callable[[T], object], *, runs: int = 1) -> ProcessMemory:
    """Measure `run(load())` in this process, which should be fresh and have imported what both need."""
    base, base_private = resident_bytes(), private_bytes()
    reset_peak()
    started = time.perf_counter()
    with PrivatePeak() as load_private:
        loaded = load()
    load_seconds = time.perf_counter() - started
    load_peak = peak_resident_bytes()
    reset_peak()
    with PrivatePeak() as run_private:
        started = time.perf_counter()
        run(loaded)
        first_run_seconds = time.perf_counter() - started
        for _ in range(runs - 1):
            run(loaded)
    video = video_memory()
    return ProcessMemory(
        base_rss_bytes=base,
        load_peak_rss_bytes=load_peak,
        run_peak_rss_bytes=peak_resident_bytes(),
        base_private_bytes=base_private,
        load_peak_private_bytes=load_private.bytes,
        run_peak_private_bytes=run_private.bytes,
        vram_bytes=video if isinstance(video, int) else None,
        load_ms=1e3 * load_seconds,
        first_run_ms=1e3 * first_run_seconds,
    )


def in_fresh_process(*arguments: str) -> Any:
    """Run `python arguments…` and return the JSON of the last line that it prints; CpcompileError if it fails.

    `-P` keeps the working folder off the child's import path: a file there may be called like a library.
    """
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").rsplit("\n", maxsplit=1)[-1]
        raise CpcompileError(f"the measuring process failed ({' '.join(arguments[:2])}): {last}")
    return json.loads(done.stdout.strip().rsplit("\n", maxsplit=1)[-1])


def available_memory() -> int | None:
    """Bytes that a new process may take before the system or a control group runs out; None where nothing tells.

    The least of MemAvailable (proc_meminfo(5)) and, of each control group of version 2 around this process, the limit
    less what is used and could not be dropped (memory.max, memory.current, inactive_file of memory.stat).
    """
    rooms = [_first_bytes(MEMINFO, "MemAvailable:")]
    try:
        groups = [line.split(":", 2)[2] for line in GROUP.read_text(encoding="ascii").splitlines() if line[:3] == "0::"]
    except OSError:
        groups = []
    for group in groups:
        folder = GROUPS / group.strip().lstrip("/")
        rooms += [_room(each) for each in (folder, *folder.parents) if each.is_relative_to(GROUPS)]
    return min((room for room in rooms if room is not None), default=None)


def _room(group: Path) -> int | None:
    """What the limit of one control group leaves; None if it has none."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):  # "max" is no number
        return None
    return max(0, limit - used + (int(cached[1]) if cached else 0))


@dataclass
class Machine:
    """What else the machine did while it was watched."""

    disturbance: str | None = None
    """A sentence for a reason; None if nothing was noticed."""


BUSY_PART, SLOW_PART = 0.1, 0.9
"""Processor time of others, and clock frequency as a part of the highest, from which on they are worth a word."""


@contextmanager
def watch_machine() -> Iterator[Machine]:
    """Notes how much of the processors others took (proc_stat(5)), and whether the clock was throttled."""
    machine, own, before = Machine(), _process_seconds(), _busy_and_stolen_seconds()
    started = time.perf_counter()
    yield machine
    seconds = (time.perf_counter() - started) * (os.cpu_count() or 1)
    after, frequency = _busy_and_stolen_seconds(), _frequency_part()
    words = []
    if before and after and seconds:
        others = (after[0] - before[0] - (_process_seconds() - own)) / seconds
        stolen = (after[1] - before[1]) / seconds
        words += [f"other processes took {others:.0%} of the processors"] if others > BUSY_PART else []
        words += [f"the host took {stolen:.0%} of them"] if stolen > BUSY_PART else []
    if frequency is not None and frequency < SLOW_PART:
        words.append(f"the clock was at {frequency:.0%} of its highest")
    machine.disturbance = ", ".join(words) or None


def _process_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _busy_and_stolen_seconds() -> tuple[float, float] | None:
    """Seconds of all processors since boot, (user, nice and system; stolen); None where there is no /proc/stat."""
    try:
        ticks = [int(field) for field in PROCESSORS.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    hertz = os.sysconf("SC_CLK_TCK")
    return sum(ticks[:3]) / hertz, ticks[7] / hertz if len(ticks) > 7 else 0.0


def _frequency_part() -> float | None:
    """The clock now as a part of its highest; None where the system does not tell."""
    try:
        now, highest = (int((FREQUENCY / name).read_text()) for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
    except (OSError, ValueError):
        return None
    return now / highest if highest else None


def environment() -> dict[str, Any]:
    """The machine and the versions, as a report states them. Nothing is imported to find a version."""
    versions: dict[str, str | None] = {name: _version(distributions) for name, distributions in PACKAGES.items()}
    return {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "gpu": gpu_model(),
        "versions": {"cpcompile": cpcompile.__version__, "python": platform.python_version(), **versions},
    }


def _status_bytes(key: str) -> int | None:
    """A field of /proc/self/status; None where there is no such file or field."""
    return _first_bytes(STATUS, f"{key}:")


def _first_bytes(path: Path, key: str) -> int | None:
    """The value, in KiB there, of the first line of a file under /proc that begins with `key`."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _cpu_model() -> str:
    return _first_value(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def gpu_model() -> str | None:
    """The NVIDIA GPU that the driver lists first; None if there is none."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return _first_value(cards[0], "Model") if cards else None


def _first_value(path: Path, key: str) -> str | None:
    """The value of the first `key : value` line of a file under /proc."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)

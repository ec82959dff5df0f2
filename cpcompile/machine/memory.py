"""The memory of a process while it loads and runs a model, and what the machine has left.

    fresh interpreter -> base RSS -> [reset peak] load -> peak -> [reset peak] run -> peak -> one line of JSON

Each side of a comparison gets a process of its own: allocators keep freed memory, so a second
measurement in the same process would include the first. The peak is VmHWM of
/proc/self/status (proc_pid_status(5)), which belongs to the address space and starts afresh with
exec. ru_maxrss of getrusage(2) does not: Linux carries it over exec, so that a small child of a
large process would report its parent's peak. It is used only where there is no /proc.

Resident pages of files, such as libraries and mapped weights, are shared by all processes, and the
system may drop them. Private memory is the rest: RssAnon, the pages without a file behind them, which were
allocated or written. It is resident - shared of /proc/self/statm, which is quick to read. (Private_Clean of
smaps_rollup also counts pages of files that no other process happens to map, and takes 10 ms to sum up.) The kernel
keeps no peak of it: a thread samples it every 5 ms, which takes 3 % of a core and misses shorter peaks.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cpcompile.core.measured import Measurements, NotMeasured
from cpcompile.machine.gpu import video_memory
from cpcompile.machine.procfs import first_bytes, status_bytes

T = TypeVar("T")

SAMPLE_SECONDS = 0.005
"""Time between two samples of private memory."""
NO_PRIVATE = "this system does not report private memory (there is no /proc/self/statm)"
STATM = Path("/proc/self/statm")
CLEAR_REFS = Path("/proc/self/clear_refs")
MEMINFO = Path("/proc/meminfo")
GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class ProcessMemory(Measurements):
    """Resident bytes of one process, and how long it took to start."""

    base_rss_bytes: int
    """The interpreter and its libraries, before anything is loaded."""
    load_peak_rss_bytes: int
    run_peak_rss_bytes: int
    """The peak while running; it includes that of loading where it cannot be reset (no /proc/self/clear_refs)."""
    base_private_bytes: int | NotMeasured
    """Before anything is loaded."""
    load_peak_private_bytes: int | NotMeasured
    """The largest sample."""
    run_peak_private_bytes: int | NotMeasured
    vram_bytes: int | NotMeasured
    """Memory on the GPUs after running."""
    load_ms: float
    first_run_ms: float
    """Its files are in the page cache; libraries are imported before."""


def resident_bytes() -> int:
    """Resident bytes of this process now; without /proc its peak, an upper bound."""
    return status_bytes("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak resident bytes since this process started, or since `reset_peak`."""
    peak = status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource  # not on Windows

    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def reset_peak() -> bool:
    """Reset the peak to what is resident now; False where the system does not allow it."""
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def private_bytes() -> int | None:
    """Resident bytes of this process without a file behind them; None where the system does not report them."""
    try:
        _, resident, shared, *_ = STATM.read_bytes().split()
    except OSError:
        return None
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class PrivatePeak:
    """The peak of private memory, sampled inside the `with` block; None where the system does not report it."""

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PrivatePeak:
        self._sample()
        if self.bytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        if (now := private_bytes()) is not None:
            self.bytes = max(self.bytes or 0, now)


def release_memory() -> None:
    """Return unused memory to the system: collect the reference cycles of models, and trim what glibc keeps.

    Otherwise a process that loads something large twice may hold both at once. Source: malloc_trim(3).
    """
    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


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
    return ProcessMemory(
        base_rss_bytes=base,
        load_peak_rss_bytes=load_peak,
        run_peak_rss_bytes=peak_resident_bytes(),
        base_private_bytes=_private(base_private),
        load_peak_private_bytes=_private(load_private.bytes),
        run_peak_private_bytes=_private(run_private.bytes),
        vram_bytes=video_memory(),
        load_ms=1e3 * load_seconds,
        first_run_ms=1e3 * first_run_seconds,
    )


def _private(size: int | None) -> int | NotMeasured:
    return NotMeasured(NO_PRIVATE) if size is None else size


def available_memory() -> int | None:
    """Bytes that a new process may take before the system or a control group runs out; None if unknown.

    The minimum of MemAvailable (proc_meminfo(5)) and, for each version 2 control group around this process, the limit
    minus what is used and cannot be dropped (memory.max, memory.current, inactive_file of memory.stat).
    """
    rooms = [first_bytes(MEMINFO, "MemAvailable:")]
    try:
        groups = [line.split(":", 2)[2] for line in GROUP.read_text(encoding="ascii").splitlines() if line[:3] == "0::"]
    except OSError:
        groups = []
    for group in groups:
        folder = GROUPS / group.strip().lstrip("/")
        rooms += [_room(each) for each in (folder, *folder.parents) if each.is_relative_to(GROUPS)]
    return min((room for room in rooms if room is not None), default=None)


def _room(group: Path) -> int | None:
    """Bytes below the limit of one control group; None if it has no limit."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):  # "max" is not a number
        return None
    return max(0, limit - used + (int(cached[1]) if cached else 0))

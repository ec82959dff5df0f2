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
"""Between two looks at private memory."""
NO_PRIVATE = "this system does not tell private memory apart (there is no /proc/self/statm)"
STATM = Path("/proc/self/statm")
CLEAR_REFS = Path("/proc/self/clear_refs")
MEMINFO = Path("/proc/meminfo")
GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class ProcessMemory(Measurements):
    """Resident bytes of one process, and what its start took."""

    base_rss_bytes: int
    """The interpreter and its libraries, before anything is loaded."""
    load_peak_rss_bytes: int
    run_peak_rss_bytes: int
    """While running. Where the peak cannot be reset (no /proc/self/clear_refs) it contains that of loading."""
    base_private_bytes: int | NotMeasured
    """Before anything is loaded."""
    load_peak_private_bytes: int | NotMeasured
    """The largest of samples."""
    run_peak_private_bytes: int | NotMeasured
    vram_bytes: int | NotMeasured
    """Memory on the GPUs after running."""
    load_ms: float
    first_run_ms: float
    """Its files are in the page cache; libraries are imported before."""


def resident_bytes() -> int:
    """Resident bytes of this process now; without /proc the peak, which is not smaller."""
    return status_bytes("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that was resident since this process began, or since `reset_peak`."""
    peak = status_bytes("VmHWM")
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
    """Bytes that a new process may take before the system or a control group runs out; None where nothing tells.

    The least of MemAvailable (proc_meminfo(5)) and, of each control group of version 2 around this process, the limit
    less what is used and could not be dropped (memory.max, memory.current, inactive_file of memory.stat).
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
    """What the limit of one control group leaves; None if it has none."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):  # "max" is no number
        return None
    return max(0, limit - used + (int(cached[1]) if cached else 0))

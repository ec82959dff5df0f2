"""Interference: what else the machine did while something was timed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROCESSORS = Path("/proc/stat")
FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")
BUSY_PART, SLOW_PART = 0.1, 0.9
"""Interference is processor time of others above this part, or a clock below this part of its maximum."""


@dataclass
class Machine:
    """The machine while `watch_machine` watches it."""

    interference: str | None = None
    """What interfered, as part of a sentence; set when the watch ends, None if nothing was noticed."""


@contextmanager
def watch_machine() -> Iterator[Machine]:
    """Record how much of the processors others took (proc_stat(5)), and whether the clock was throttled."""
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
        words.append(f"the clock was at {frequency:.0%} of its maximum")
    machine.interference = ", ".join(words) or None


def _process_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _busy_and_stolen_seconds() -> tuple[float, float] | None:
    """Seconds of all processors since boot, (user + nice + system, stolen); None where there is no /proc/stat."""
    try:
        ticks = [int(field) for field in PROCESSORS.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    hertz = os.sysconf("SC_CLK_TCK")
    return sum(ticks[:3]) / hertz, ticks[7] / hertz if len(ticks) > 7 else 0.0


def _frequency_part() -> float | None:
    """The clock frequency as a part of its maximum; None where the system does not report it."""
    try:
        now, maximum = (int((FREQUENCY / name).read_text()) for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
    except (OSError, ValueError):
        return None
    return now / maximum if maximum else None

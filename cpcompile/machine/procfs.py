"""Values in the text files of /proc and /sys."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")


def status_bytes(key: str) -> int | None:
    """A field of /proc/self/status; None where there is no such file or field."""
    return first_bytes(STATUS, f"{key}:")


def first_bytes(path: Path, key: str) -> int | None:
    """The value, in KiB there, of the first line of a file under /proc that begins with `key`."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def first_value(path: Path, key: str) -> str | None:
    """The value of the first `key : value` line of a file under /proc."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)

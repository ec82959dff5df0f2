"""Values from the text files under /proc."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")


def status_bytes(key: str) -> int | None:
    """The field `key` of /proc/self/status in bytes; None where there is no such file or field."""
    return first_bytes(STATUS, f"{key}:")


def first_bytes(path: Path, key: str) -> int | None:
    """The value in bytes of the first line that begins with `key`, given there in KiB; None if there is none."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def first_value(path: Path, key: str) -> str | None:
    """The value of the first line `key : value`; None if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)

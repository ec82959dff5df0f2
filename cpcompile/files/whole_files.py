"""Files that are written whole or not at all, overwrite nothing of other kinds, and belong to one process at a time.

A file grows under a hidden name beside its target that contains the process id, and is renamed when it is complete.
The next process removes what a killed one left behind.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpcompile.core.errors import CpcompileError, UsageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MOST_TEXT = 1 << 28
"""The largest text file in bytes; a report of a hundred engines has a few million."""


def require_file_path(path: Path, suffix: str | None = None) -> Path:
    """`path` without links; UsageError unless it is free or a regular file, and its name ends in `suffix`."""
    if not path.name or path.is_dir():
        raise UsageError(f"{path}: is a folder; give the path of a file")
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not target.is_file():
        raise UsageError(f"{path}: is not a regular file; choose another output")
    if suffix and target.exists() and target.suffix != suffix:
        raise UsageError(f"{path}: exists and is not named {suffix}, so it is kept; choose another output or remove it")
    if suffix and path.suffix != suffix:
        raise UsageError(f"{path}: is not named {suffix}, as what is written has to be; choose another name")
    return target


def require_regular_file(path: Path, expected: str) -> None:
    """UsageError for a folder, a pipe or a device; a missing file is left to the code that opens it."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise UsageError(f"{path}: is {kind}; {expected}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a new empty file, which replaces `path` when the block ends without an error.

    UsageError: `path` is a folder, a device or the like. CpcompileError: it cannot be written.
    """
    target = require_file_path(path)
    temporary = temporary_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        # Always a new file, with the permissions that the user's umask gives.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # otherwise the renamed file can be empty after a power cut
        temporary.replace(target)
    except OSError as error:
        raise CpcompileError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another output"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_text(path: Path) -> str:
    """The text of a regular file of limited size; OSError for a pipe, a device or a larger file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if status.st_size > MOST_TEXT:
        raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {MOST_TEXT:,}", str(path))
    return path.read_text(encoding="utf-8")


def cache_folder() -> Path:
    """The folder of cached files, by the XDG base directory specification, which ignores a relative path."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "cpcompile"


def file_digest(path: Path) -> str:
    """The SHA-256 of the content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def only_process(
    lock: Path, message: str | None = None, *, on_wait: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold the file `lock`. While another process does, raise UsageError with `message`; without one, wait for it.

    on_wait is called once before waiting. The lock ends with the process: a killed one does not hold it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("wb") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if message is not None:
                    raise UsageError(message) from None
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def temporary_path(target: Path) -> Path:
    """A hidden path beside `target` to build it at, whose name contains the process id."""
    return target.with_name(f"{_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}")


def remove_leftovers(target: Path) -> None:
    """Remove unfinished builds of `target`, except those of running processes."""
    prefix = _prefix(target)
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        process = path.name.removeprefix(prefix).split("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.building-"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True

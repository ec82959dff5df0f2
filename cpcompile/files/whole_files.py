"""Files that are written whole or not at all, overwrite nothing of other kinds, and belong to one process at a time.

A file or folder grows under a hidden name beside its target, locked by its process, and is renamed when it is complete.
A lock ends with its process, however that ends: whoever next writes in that folder removes what is not locked. Process
ids would not do, because containers use the same few ids again and do not see each other's processes. A file system
without locks keeps what a killed process left.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.files.pointers import require_fetched

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNFINISHED = re.compile(r"\..+\.building-[0-9]+-[0-9a-f]{8}", re.DOTALL)
"""The names of what is not finished: the target, the process and a random number."""
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
    try:
        with unfinished(target) as temporary:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # otherwise the renamed file can be empty after a power cut
            temporary.replace(target)
    except OSError as error:
        raise CpcompileError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another output"
        ) from error


@contextmanager
def unfinished(target: Path, *, folder: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """Yield a new empty file, or `folder`, beside `target` to build it in; it is removed unless it was renamed.

    OSError: it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    path, lock = _make_locked(target, folder, mode)
    try:
        yield path
    finally:
        _remove(path)
        os.close(lock)


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Yield a private folder for the files of some work, among the system's temporary files; removed at the end."""
    with unfinished(Path(tempfile.gettempdir()) / f"cpcompile-{purpose}", folder=True, mode=0o700) as path:
        yield path


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`; what cannot be removed stays."""
    with suppress(OSError):
        for path in folder.iterdir():
            if UNFINISHED.fullmatch(path.name):
                _remove_if_abandoned(path)


def _make_locked(target: Path, folder: bool, mode: int) -> tuple[Path, int]:
    while True:
        path = target.with_name(f".{target.name}.building-{os.getpid()}-{secrets.token_hex(4)}")
        if folder:
            path.mkdir(mode)
        # A file is always a new one, with the permissions that the user's umask gives.
        how = os.O_RDONLY if folder else os.O_CREAT | os.O_EXCL | os.O_WRONLY
        with suppress(FileNotFoundError):
            lock = os.open(path, how, mode & 0o666)
            if _lock(lock) is not False and path.exists():
                return path, lock
            os.close(lock)
        # Another process took it for a leftover before it was locked.


def _remove_if_abandoned(path: Path) -> None:
    with suppress(OSError):
        lock = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            if _lock(lock):  # and hold it until it is gone
                _remove(path)
        finally:
            os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _lock(file: int) -> bool | None:
    """Lock an open file or folder; False if another process holds it, None if it cannot be locked here."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # of a file system without locks
        return None
    return True


def read_text(path: Path) -> str:
    """The text of a regular file of limited size; OSError for a pipe, a device or a larger file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if status.st_size > MOST_TEXT:
        raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {MOST_TEXT:,}", str(path))
    require_fetched(path)
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

"""The Python bindings of TensorRT 10, 11 or TensorRT-RTX, imported when they are needed, and one logger for them.

The three have nearly the same names; what is in all of them, and in which not, is in tests/data/tensorrt_api.json.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from cpcompile.core.errors import UsageError, first_line
from cpcompile.targets.requests import TENSORRT, TENSORRT_RTX

MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}


def load_library(flavour: str) -> Any:
    """The module of `flavour`; UsageError says how to install it."""
    try:
        return importlib.import_module(MODULES[flavour])
    except Exception as error:  # of a half-installed library anything: OSError, RuntimeError, its own classes
        raise UsageError(
            f"{flavour} needs the library of that name ({first_line(error)}): pip install 'cpcompile[{flavour}]'; "
            "`cpcompile doctor` says what else is missing"
        ) from error


@cache
def logger_of(library: Any) -> Any:
    """The logger of the process for `library`, since only the first one counts; its `listening()` collects errors."""

    class Log(library.ILogger):  # type: ignore[misc]
        """Keeps errors; warnings and below help nobody who builds or runs."""

        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self._messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR):
                self._messages.append(message)

        @contextmanager
        def listening(self) -> Iterator[list[str]]:
            self._messages = []
            yield self._messages

    return Log()

"""The Python bindings of TensorRT 10, 11 or TensorRT-RTX, imported when they are needed, and their logger.

The three have nearly the same API; tests/data/tensorrt_api.json lists which names exist in which.
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
    except Exception as error:  # a half-installed library may raise anything
        raise UsageError(
            f"{flavour} needs its library ({first_line(error)}): pip install 'cpcompile[{flavour}]'; "
            "`cpcompile doctor` says what else is missing"
        ) from error


@cache
def logger_of(library: Any) -> Any:
    """The logger for `library`, one per process because only the first counts; `listening()` collects errors."""

    class Log(library.ILogger):  # type: ignore[misc]
        """Keeps errors; warnings and lower severities are of no use to users."""

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

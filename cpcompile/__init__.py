"""cpcompile: train one model for many contexts, compile each context into its own small static graph.

For torch modules of your own: `cpcompile.partition` puts gates into one, `cpcompile.select_units` chooses what each
context keeps, and `cpcompile.save_program` writes a program that `cpcompile build` takes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from cpcompile.core.extras import missing_extra
from cpcompile.core.version import __version__

if TYPE_CHECKING:
    from cpcompile.frontend.program import save_program
    from cpcompile.partitioning import partition
    from cpcompile.training.select_units import select_units

__all__ = ["__version__", "partition", "save_program", "select_units"]

_MODULES = {
    "partition": "cpcompile.partitioning",
    "save_program": "cpcompile.frontend.program",
    "select_units": "cpcompile.training.select_units",
}
"""The module that each public name comes from: torch is imported when the first of them is used."""


def __getattr__(name: str) -> object:
    """Import what is public when it is first used; ModuleNotFoundError names the extra that it needs."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if (sentence := missing_extra(error, f"cpcompile.{name}")) is None:
            raise
        raise ModuleNotFoundError(sentence, name=error.name) from error

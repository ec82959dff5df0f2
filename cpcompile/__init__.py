"""cpcompile: train one model for many contexts, compile each context into its own small static graph.

For torch modules of your own: `cpcompile.partition` puts gates into one, `cpcompile.select_units` chooses what each
context keeps, and `cpcompile.save_program` writes a program that `cpcompile build` takes.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


API = {
    "partition": "cpcompile.partitioning",
    "save_program": "cpcompile.frontend.program",
    "select_units": "cpcompile.training.select_units",
}
"""What stands at the top, and the module that it comes from."""


def __getattr__(name: str) -> Any:
    """What is in `API` is there without torch being imported before it is used."""
    if name in API:
        return getattr(importlib.import_module(API[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

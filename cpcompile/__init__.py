"""cpcompile: train one model for many contexts, compile each context into its own small static graph.

`cpcompile.partition(model, example_inputs)` makes any torch module ready for contexts.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`partition` is there without torch being imported before it is used."""
    if name == "partition":
        return importlib.import_module("cpcompile.partitioning").partition
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

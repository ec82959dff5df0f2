"""Types that all packages use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

Progress = Callable[[str, int, int | None], None]
"""Called by long-running work with the stage, the units done and their total (None if unknown).

A stage called `whole: part` is a part of the stage `whole`, which goes on.
"""
Steps = Callable[[int, int], None]
"""Progress of a single stage: the units done and their total."""


Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
"""Inputs of a model by name."""


def unwatched(_done: int, _total: int) -> None:
    """Steps that nobody watches."""

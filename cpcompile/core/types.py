"""Types that all packages use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

Progress = Callable[[str, int, int | None], None]
"""Called by long-running work with the stage, the units done and their total (None if unknown)."""
Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
"""Inputs of a model by name."""

"""Types that every room uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

Progress = Callable[[str, int, int | None], None]
"""What a long work calls: stage, units done, units in all (None where that is unknown)."""
Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
"""Inputs of a model by name."""

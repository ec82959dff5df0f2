"""What was found of one thing: a package, a program, a driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "absent", "broken"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`broken`: it is there and does not work."""

    name: str
    state: State
    version: str | None = None
    detail: str = ""
    """What it has, or what is wrong with it."""
    fix: tuple[str, ...] = ()
    """Commands, in order; none where there is nothing to do."""

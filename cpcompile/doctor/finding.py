"""A finding: the state of one package, program or driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "absent", "broken"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The state of one thing; `broken` means that it is present but does not work."""

    name: str
    state: State
    version: str | None = None
    detail: str = ""
    """What it provides, or what is wrong with it."""
    fix: tuple[str, ...] = ()
    """Commands that fix it, in order; empty if there is nothing to do."""

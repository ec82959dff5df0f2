"""Sizes of memory as people write them: 800MB, 1.5GB, 2GiB."""

from __future__ import annotations

import re
from fractions import Fraction

from cpcompile.core.errors import UsageError

SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgt])(i?)b?|b)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Parse a size into whole bytes, at least one; UsageError says how to write one.

    GB (or G) is 10^9, GiB (or Gi) is 2^30, and a bare number is bytes.
    """
    match = SIZE.fullmatch(text.strip())
    size = round(Fraction(match[1]) * _unit(match[2], binary=bool(match[3]))) if match else 0
    if not size:
        raise UsageError(f"{text[:40]!r} is not a memory size; write it like 800MB, 1.5GB or 2GiB")
    return size


def _unit(prefix: str | None, *, binary: bool) -> int:
    power = " kmgt".index(prefix.lower()) if prefix else 0
    return int((1024 if binary else 1000) ** power)

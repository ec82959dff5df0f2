"""Sizes of memory as people write them: 800MB, 1.5GB, 2GiB."""

from __future__ import annotations

import re
from fractions import Fraction

from cpcompile.core.errors import UsageError

SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgt])(i?)b?|b)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Whole bytes, at least one; UsageError says how a size is written.

    GB (or G) is 10^9, GiB (or Gi) 2^30, a number alone counts bytes.
    """
    match = SIZE.fullmatch(text.strip())
    size = round(Fraction(match[1]) * _unit(match[2], binary=bool(match[3]))) if match else 0
    if not size:
        raise UsageError(f"{text[:40]!r} is no size of memory; write it like 800MB, 1.5GB or 2GiB")
    return size


def _unit(prefix: str | None, *, binary: bool) -> int:
    power = " kmgt".index(prefix.lower()) if prefix else 0
    return int((1024 if binary else 1000) ** power)

"""Sizes of memory as people write them: 800MB, 1.5GB, 2GiB."""

from __future__ import annotations

import re

from cpcompile.errors import UsageError

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes; UsageError says how a size is written. GB (or G) is 10^9, GiB 2^30, a number alone counts bytes."""
    match = SIZE.fullmatch(text.strip())
    if match is None or not (size := round(float(match[1]) * _unit(match[2], match[3] or ""))):
        raise UsageError(f"{text!r} is no size of memory; write it like 800MB, 1.5GB or 2GiB")
    return size


def _unit(prefix: str, suffix: str) -> int:
    base = 1024 if suffix.lower() == "ib" else 1000
    return int(base ** " kmgt".index(prefix.lower() or " "))

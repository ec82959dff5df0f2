"""Values of settings, from files, options and callers: each becomes what its field declares, or an error names it.

int    whole numbers up to LARGEST, of numpy as well; no bool
float  any finite number
tuple  lists and tuples, item by item; dict  tables, value by value
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpcompile.core.errors import UsageError
from cpcompile.core.measured import field_types

LARGEST = 2**31 - 1
"""Largest integer setting that all libraries support."""


def require(condition: bool, message: str) -> None:
    """UsageError with `message` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def require_range(config: Any, where: str, names: str, holds: Callable[[Any], bool], need: str) -> None:
    """UsageError unless the fields of `config` with these `names`, separated by spaces, are what they need to be."""
    for name in names.split():
        value = getattr(config, name)
        require(holds(value), f"{where}.{name} is {value}: it {need}")


def as_path(value: object, where: str) -> Path:
    """`value`, a text or a path, as a Path; UsageError names `where` it was given."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise UsageError(f"{where}: {value!r:.80} is not a path; give a str or a pathlib.Path")
    return Path(value)


def coerce_fields(config: Any, where: str) -> None:
    """Give every field of the dataclass `config` the type that it declares, in place; `where` names `config`."""
    for name, hint in field_types(type(config)).items():
        object.__setattr__(config, name, coerce(getattr(config, name), hint, f"{where}.{name}"))


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as a `hint`; UsageError names the setting `where` and what it needs."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # with None
        return None if value is None else coerce(value, arguments[0], where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        require(type(value) is hint, f"{where} is {value!r:.80}: a table is needed")
        return dataclasses.replace(
            value,
            **{name: coerce(getattr(value, name), own, f"{where}.{name}") for name, own in field_types(hint).items()},
        )
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} is {value!r:.80}: a list is needed")
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        require(len(value) == len(hints), f"{where} is {value!r:.80}: a list of {len(hints)} is needed")
        pairs = enumerate(zip(value, hints, strict=True))
        return tuple(coerce(each, own, f"{where}[{index}]") for index, (each, own) in pairs)
    if origin is not None:
        require(isinstance(value, Mapping), f"{where} is {value!r:.80}: a table is needed")
        return {key: coerce(each, arguments[1], f"{where}.{key}") for key, each in value.items()}
    return value if hint is Any else _coerce_plain(value, hint, where)


def _coerce_plain(value: Any, hint: type, where: str) -> Any:
    flag = isinstance(value, bool)
    if hint in (int, float) and isinstance(value, numbers.Integral) and not flag:
        require(abs(int(value)) <= LARGEST, f"{where}: is beyond {LARGEST:,} in size")
        value = hint(value)
    elif hint is float and isinstance(value, numbers.Real) and not flag:
        value = float(value)
    require(type(value) is hint, f"{where} is {value!r:.80}: {hint.__name__} is needed")
    require(hint is not float or math.isfinite(value), f"{where} is {value}: a finite number is needed")
    return value

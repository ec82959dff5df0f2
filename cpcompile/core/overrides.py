"""Values from tables and flags in place of the fields of a configuration."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from cpcompile.core.config import LARGEST, T, require


def override(config: T, values: Mapping[str, Any], *, where: str) -> T:
    """A copy of the dataclass `config` with `values` in place of its own; None leaves a field alone.

    A table replaces only the entries that it contains.
    """
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        require(name in hints, f"{where}: there is no setting {name!r}; there are {', '.join(hints)}")
        own = getattr(config, name)
        if dataclasses.is_dataclass(own) and not isinstance(own, type):
            require(isinstance(value, Mapping), f"{where}.{name} is {value!r}: a table is needed")
            changes[name] = override(own, value, where=f"{where}.{name}")
            continue
        new = _coerce(value, hints[name], f"{where}.{name}")
        changes[name] = {**own, **new} if isinstance(new, dict) else new
    return dataclasses.replace(config, **changes)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} is {value!r}: a list is needed")
        return tuple(value)
    if origin is not None:
        require(isinstance(value, Mapping), f"{where} is {value!r}: a table is needed")
        item = typing.get_args(hint)[1]
        return {key: _coerce(each, item, f"{where}.{key}") for key, each in value.items()}
    if type(value) is int:
        require(abs(value) <= LARGEST, f"{where}: is beyond {LARGEST:,} in size")
        value = float(value) if hint is float else value
    require(type(value) is hint, f"{where} is {value!r}: {hint.__name__} is needed")
    require(hint is not float or math.isfinite(value), f"{where} is {value}: a finite number is needed")
    return value

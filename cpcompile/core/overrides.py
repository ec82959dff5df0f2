"""Values from tables and flags in place of the fields of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from cpcompile.core.coercion import coerce, require
from cpcompile.core.errors import UsageError
from cpcompile.core.measured import field_types

T = TypeVar("T")


def override(config: T, values: Mapping[str, Any], *, where: str) -> T:
    """A copy of the dataclass `config` with `values` in place of its own; None leaves a field alone.

    A table replaces only the entries that it contains. where: "TABLE" or "FILE: TABLE", for errors.
    """
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    hints = field_types(type(config))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        require(name in hints, f"{where}: there is no setting {name!r}; there are {', '.join(hints)}")
        own = getattr(config, name)
        if dataclasses.is_dataclass(own) and not isinstance(own, type):
            require(isinstance(value, Mapping), f"{where}.{name} is {value!r:.80}: a table is needed")
            changes[name] = override(own, value, where=f"{where}.{name}")
            continue
        new = coerce(value, hints[name], f"{where}.{name}")
        changes[name] = {**own, **new} if isinstance(new, dict) else new
    try:
        return dataclasses.replace(config, **changes)
    except UsageError as error:  # which names the table itself
        file, separator, _ = where.rpartition(": ")
        raise UsageError(f"{file}{separator}{error}") from error

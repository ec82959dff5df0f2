"""A value, or the reason why there is none."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal, Self


@dataclass(frozen=True)
class NotMeasured:
    """Takes the place of a value and says why there is none; false, so that `or` gives a default."""

    reason: str

    def __bool__(self) -> Literal[False]:
        return False

    def __str__(self) -> str:
        return self.reason


class Measurements:
    """A result of measurements: a dataclass in which some fields hold a value or `NotMeasured`."""

    @property
    def not_measured(self) -> dict[str, str]:
        """Field -> the reason why it has no value."""
        values = ((name, getattr(self, name)) for name in measurable(type(self)))
        return {name: value.reason for name, value in values if isinstance(value, NotMeasured)}

    @classmethod
    def without(cls, reason: str, /, **known: Any) -> Self:
        """A result in which nothing was measured, for one `reason`, except the fields in `known`."""
        return cls(**{**dict.fromkeys(measurable(cls), NotMeasured(reason)), **known})


def measurable(kind: type) -> tuple[str, ...]:
    """The fields of the dataclass `kind` that may be `NotMeasured`, in order."""
    return tuple(name for name, hint in field_types(kind).items() if NotMeasured in typing.get_args(hint))


_FIELD_TYPES: dict[type, dict[str, Any]] = {}


def field_types(kind: type) -> dict[str, Any]:
    """The fields of the dataclass `kind` in order, with their types; resolved once, which takes long."""
    assert dataclasses.is_dataclass(kind)
    if kind not in _FIELD_TYPES:
        hints = typing.get_type_hints(kind)
        _FIELD_TYPES[kind] = {each.name: hints[each.name] for each in dataclasses.fields(kind)}
    return _FIELD_TYPES[kind]

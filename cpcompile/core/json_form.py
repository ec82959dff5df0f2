"""Results to JSON and back: the only place that knows how dataclasses become objects.

field with a value    ->  its JSON form; tuples are arrays
field not measured    ->  null, and `not_measured` of the same object maps the field to the reason
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from cpcompile.core.measured import Measurements, NotMeasured, field_types

T = TypeVar("T")
NOT_MEASURED = "not_measured"
NO_REASON = "no reason is given"


def to_json(value: Any) -> Any:
    """`value` in plain containers, exactly as a file would give them back."""
    if isinstance(value, NotMeasured):
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        content = {each.name: to_json(getattr(value, each.name)) for each in dataclasses.fields(value)}
        return content | {NOT_MEASURED: value.not_measured} if isinstance(value, Measurements) else content
    if isinstance(value, Mapping):
        return {str(key): to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    return value


def from_json(kind: type[T], content: Any) -> T:
    """The `kind` from which `to_json` made `content`; TypeError, KeyError or ValueError if there is none."""
    return typing.cast(T, _restore(kind, content, None))


def _restore(kind: Any, content: Any, reason: str | None) -> Any:
    """`content` as a `kind`; reason: why it is null, if the enclosing object says so."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _restore_union(arguments, content, reason)
    if origin is Literal:
        return _require(content in arguments, content, kind)
    if origin is tuple:
        _require(isinstance(content, list), content, kind)
        if arguments[-1] is Ellipsis:
            return tuple(_restore(arguments[0], each, None) for each in content)
        return tuple(_restore(each, value, None) for each, value in zip(arguments, content, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _require(isinstance(content, dict), content, kind)
        return {key: _restore(arguments[1], each, None) for key, each in content.items()}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        _require(isinstance(content, list), content, kind)
        return tuple(_restore(arguments[0], each, None) for each in content)
    if dataclasses.is_dataclass(kind):
        return _restore_object(kind, content)
    if kind is float:
        return _require(type(content) in (int, float), content, kind)
    if kind is int and type(content) is float and content.is_integer():  # an integer to JSON Schema
        return int(content)
    return content if kind is Any else _require(type(content) is kind, content, kind)


def _restore_object(kind: Any, content: Any) -> Any:
    _require(isinstance(content, dict), content, kind)
    fields = field_types(kind)
    reasons = content[NOT_MEASURED] if issubclass(kind, Measurements) else {}
    if unknown := content.keys() - {*fields, NOT_MEASURED}:
        raise KeyError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    present = {name: hint for name, hint in fields.items() if name in content}  # others need a default
    return kind(**{name: _restore(hint, content[name], reasons.get(name)) for name, hint in present.items()})


def _restore_union(arguments: tuple[Any, ...], content: Any, reason: str | None) -> Any:
    if content is None:
        if NotMeasured in arguments and (reason is not None or type(None) not in arguments):
            return NotMeasured(NO_REASON if reason is None else str(reason))
        return _require(type(None) in arguments, content, arguments)
    if type(content) in arguments:
        return content
    errors = []
    for kind in arguments:
        if kind in (NotMeasured, type(None)):
            continue
        try:
            return _restore(kind, content, None)
        except (TypeError, KeyError, ValueError) as error:
            errors.append(error)
    raise errors[0] if len(errors) == 1 else TypeError(f"{content!r} is none of {arguments}")


def _require(fits: bool, content: Any, kind: Any) -> Any:
    if fits is not True:
        raise TypeError(f"{content!r:.80} instead of {getattr(kind, '__name__', kind)}")
    return content

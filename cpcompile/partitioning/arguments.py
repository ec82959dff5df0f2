"""What callers give to `partition`, `select_units` and `save_program`, in the form in which it is used."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from cpcompile.core.coercion import require
from cpcompile.core.errors import UsageError
from cpcompile.core.selection import UnitKind


def as_inputs(value: object, where: str) -> tuple[Tensor, ...]:
    """The inputs of a forward pass: a tensor alone, or a tuple or list of tensors."""
    if isinstance(value, Tensor):
        return (value,)
    require(isinstance(value, tuple | list), f"{where} is a {type(value).__name__}: a tuple of tensors is needed")
    assert isinstance(value, tuple | list)
    for index, each in enumerate(value):
        if not isinstance(each, Tensor):
            raise UsageError(
                f"{where}[{index}] is a {type(each).__name__}: a tensor is needed; set other arguments in `forward`"
            )
    return tuple(value)


def as_kinds(value: Collection[UnitKind | str] | str) -> tuple[UnitKind, ...]:
    """Kinds of units by their names."""
    names = [value] if isinstance(value, str) else list(value)
    there = [str(kind) for kind in UnitKind]
    for name in names:
        require(name in there, f"kinds: {name!r} is none of {', '.join(there)}")
    return tuple(UnitKind(name) for name in names)

"""What every rule needs: the arguments of an operator, and ids moved one array at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import fx

from cpcompile.partitioning.channel_ids import ChannelIds, Value
from cpcompile.partitioning.flow import Flow

Result = Value | list[Value]
Rule = Callable[[Flow, fx.Node], Result]


def first_value(flow: Flow, node: fx.Node) -> Value:
    """The value of the first argument, a tensor."""
    value = flow.value(node.args[0])
    assert value is not None
    return value


def argument_of(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or name, or its default."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def axis_of(value: Value, axis: int) -> int:
    """The axis counted from 0."""
    return axis % value.rank


def move_each(flow: Flow, node: fx.Node, move: Callable[[ChannelIds], ChannelIds]) -> Value:
    """The result of an operator that does to each array of ids what `move` does."""
    value = first_value(flow, node)
    channel_ids = tuple(move(ids) for ids in value.channel_ids)
    return replace(flow.plain(node.meta["val"]), channel_ids=channel_ids, constant=value.constant)


def as_channels(vector: Value, rank: int, axis: int) -> Value:
    """A vector of channels in a tensor of `rank` with channels at `axis`."""

    def placed(length: int) -> tuple[int, ...]:
        return tuple(length if a == axis else 1 for a in range(rank))

    channel_ids = tuple(ids.reshape(placed(ids.size)) for ids in vector.channel_ids)
    return Value(placed(vector.shape[0]), (False,) * rank, channel_ids, vector.constant)


def rules_of(**families: tuple[Rule, str]) -> Mapping[str, Rule]:
    """A table from families of operators, each with its rule and their names."""
    return MappingProxyType({name: rule for rule, names in families.values() for name in names.split()})

"""What every aten operator does with channel ids: one rule per operator, one file per family.

Pointwise operators are recognised by their tag, the others are in `RULES`. An operator without a rule keeps the
channels of everything that it reads. Operators: https://docs.pytorch.org/docs/stable/torch.compiler_ir.html
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from cpcompile.partitioning.channel_ids import Value, varied
from cpcompile.partitioning.flow import Flow, place
from cpcompile.partitioning.rules import contraction, mixing, movement
from cpcompile.partitioning.rules.rule import Rule, first_value, rules_of


def propagate(flow: Flow, node: fx.Node) -> Any:
    """The values of the results of `node`; None if they are no tensors."""
    example = node.meta.get("val")
    if node.target is operator.getitem:
        values = flow.values.get(node.args[0])  # type: ignore[arg-type]
        return values[node.args[1]] if isinstance(values, list) else None  # type: ignore[index]
    read = flow.tensors(node)
    if isinstance(example, (list, tuple)):
        plain = [flow.plain(e) if isinstance(e, torch.Tensor) else None for e in example]
    elif isinstance(example, torch.Tensor):
        plain = [flow.plain(example, constant=all(v.constant for v in read))]
    else:
        return None
    rule = RULES.get(str(node.target).removeprefix("aten.").split(".")[0].rstrip("_"))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _pointwise
    result: Any = plain if isinstance(example, (list, tuple)) else plain[0]
    if rule is None:
        why = f"there is no rule for {place(node)}"
        flow.block_all(read, why)
        if any(value.channel_ids for value in read):
            flow.opaque[node] = why
    elif any(value.channel_ids for value in read):
        result = rule(flow, node)
        results = result if isinstance(result, list) else [result]
        if any(value is not None and 0 in value.shape for value in results):  # an empty tensor holds no channels
            result = plain if isinstance(result, list) else plain[0]
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable and isinstance(node.args[0], fx.Node):
        flow.values[node.args[0]] = result  # in place
    return result


def _pointwise(flow: Flow, node: fx.Node) -> Value:
    return flow.agree(flow.tensors(node), flow.plain(node.meta["val"]), f"{place(node)} meets a tensor that keeps it")


def _embedding(flow: Flow, node: fx.Node) -> Value:
    table, out = first_value(flow, node), flow.plain(node.meta["val"])
    columns = []
    for ids in table.channel_ids:
        if 0 in varied(ids):
            flow.coupling.block(ids, f"{place(node)} picks rows by what it reads")
        else:
            columns.append(ids.reshape((1,) * (out.rank - 1) + ids.shape[1:]))
    return replace(out, channel_ids=tuple(columns))


def _no_channels(flow: Flow, node: fx.Node) -> Value:
    """The result does not depend on the elements that are read."""
    return flow.plain(node.meta["val"])


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **movement.RULES,
        **mixing.RULES,
        **contraction.RULES,
        **rules_of(
            pointwise=(
                _pointwise,
                "where rsub square relu6 hardswish hardtanh mish selu celu elu log_sigmoid clip true_divide divide "
                "multiply subtract floor_divide masked_fill",
            ),
            embedding=(_embedding, "embedding"),
            no_channels=(_no_channels, "new_zeros new_ones new_full new_empty sym_size"),
        ),
    }
)
"""Operator without its overload -> rule."""

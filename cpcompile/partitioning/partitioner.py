"""`partition`: find the groups of a model, put gates in front of their consumers, and prove that nothing changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cpcompile.core.coercion import coerce, require
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.selection import UnitKind
from cpcompile.partitioning.arguments import as_inputs, as_kinds
from cpcompile.partitioning.experts import find_experts
from cpcompile.partitioning.forms import outputs_of, require_supported
from cpcompile.partitioning.gating import has_gates
from cpcompile.partitioning.groups import find_groups, find_whole
from cpcompile.partitioning.live_parameters import find_live_parameters
from cpcompile.partitioning.partitioned_module import PartitionedModule
from cpcompile.partitioning.trace import Forward, trace


def partition(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    contexts: int = 1,
    forward: Forward | None = None,
    dynamic_shapes: tuple[Any, ...] | None = None,
    align: int = 32,
    kinds: Collection[UnitKind | str] = (UnitKind.FFN, UnitKind.HEAD, UnitKind.EXPERT),
) -> PartitionedModule:
    """`model` with gates on all its coupled channel groups, one row of them per context, all at 1.

    model: any module that torch.export takes; it is changed in place (hooks), its parameters stay its own
    forward: forward(model, *example_inputs), where the model's own forward has other arguments or results
    dynamic_shapes: per input a dict axis -> torch.export.Dim, as torch.export takes them
    align: channels of a unit; a head or an expert is always one unit
    kinds: the kinds of groups to gate

    UsageError: a form of model, input or output that has no engine, a model that cannot be exported, that has gates
    already, or that has nothing to gate.
    """
    example_inputs, kinds = as_inputs(example_inputs, "example_inputs"), as_kinds(kinds)
    for name, number in (("contexts", contexts), ("align", align)):
        require(coerce(number, int, name) >= 1, f"{name} is {number}: it has to be at least 1")
    require_supported(model, example_inputs)
    if has_gates(model):
        raise UsageError(f"{type(model).__name__} has gates already: partition a fresh copy of it")
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
    except NotImplementedError as error:
        name = type(model).__name__
        raise UsageError(f"{name} is an exported program; partition the module that it was made from") from error
    try:
        traced = trace(model, example_inputs, forward, dynamic_shapes)
        found = find_groups(traced, align) + find_experts(traced)
        groups = tuple(group for group in found.groups if group.kind in kinds)
        live = find_live_parameters(traced, groups, found.unit_numbers(groups))
        unused = live.unused(sum(group.units for group in groups))
        refused = found.refused + find_whole(traced, groups, found, unused)
        if not groups:
            reasons = "".join(f"\n  {each}" for each in refused)
            raise UsageError(f"{type(model).__name__} has no channels that can be gated{reasons}")
        with torch.no_grad():
            before = forward(model, *example_inputs) if forward else model(*example_inputs)
        partitioned = PartitionedModule(
            model,
            forward,
            contexts=contexts,
            groups=groups,
            refused=refused,
            live_parameters=live,
            unused=unused,
            outputs=outputs_of(model, before, traced.graph),
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
        )
        with torch.no_grad():
            after = partitioned(*example_inputs, context=partitioned.gate_row(0))
        _prove(partitioned, before, after, found.calls(groups))
    finally:
        for module in training:
            module.training = True
    return partitioned


def _prove(module: PartitionedModule, before: object, after: object, expected: Counter[tuple[str, str]]) -> None:
    """Same outputs, and every gate applied as often as the graph says."""
    for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        if isinstance(old, Tensor) and not torch.equal(old, new):
            raise CpcompileError("a model with all gates at 1 gives other outputs; its forward pass is not repeatable")
    if module.calls != dict(expected):
        raise CpcompileError(f"gates were applied {module.calls}, the exported graph says {dict(expected)}")

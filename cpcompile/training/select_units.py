"""Which units the contexts of a partitioned module keep: its importance on their inputs, within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from torch import Tensor

from cpcompile.core.coercion import coerce, require
from cpcompile.core.config import require_context_name
from cpcompile.core.errors import UsageError
from cpcompile.core.selection import BoolArray, Selection, UnitKind
from cpcompile.partitioning.arguments import as_inputs
from cpcompile.partitioning.partitioned_module import PartitionedModule, require_partitioned
from cpcompile.training.allocation import allocate
from cpcompile.training.importance import Loss, equal_importance, measure_group_importance, stack_contexts


def select_units(
    module: PartitionedModule,
    batches: Mapping[str, Iterable[tuple[Tensor, ...]]],
    loss: Loss,
    budgets: Mapping[str, float],
    *,
    specificity: float = 0.0,
    floor: float = 0.5,
) -> Selection:
    """Measure importance on the `batches` of every context, and keep what matters within `budgets`; sets the gates.

    batches: context -> inputs of forward passes, samples along the first axis
    loss: loss(output, inputs) -> scalar, summed over samples; inputs are those of the batch
    budgets: kind of unit ("ffn", "head", "expert") -> part of them that a context keeps; other kinds stay whole
    specificity: -1 chooses the same units for all contexts, 0 for each its own best, above 0 units that differ
    floor: part of the budget that every layer keeps at least

    Layers with equally many units share their budget; where all budgets are 1, nothing is measured. UsageError:
    contexts or kinds that the module does not have.
    """
    require_partitioned(module)
    require(isinstance(batches, Mapping), f"batches is a {type(batches).__name__}: a dict by context is needed")
    contexts = tuple(batches)
    for context in contexts:
        require_context_name(context, "batches")
    if len(contexts) != module.contexts:
        raise UsageError(f"the module has gates for {module.contexts} contexts, the batches are of {len(contexts)}")
    kinds = {units.kind for units in module.units()}
    budgets = coerce(budgets, dict[str, float], "budgets")
    specificity, floor = coerce(specificity, float, "specificity"), coerce(floor, float, "floor")
    for kind, budget in budgets.items():
        if kind not in kinds:
            raise UsageError(f"budgets: the module has no units of kind {kind!r}; it has {', '.join(sorted(kinds))}")
        if not 0 < budget <= 1:
            raise UsageError(f"budgets: {kind} = {budget}; it lies above 0 and up to 1")
    if not -1 <= specificity <= 1:
        raise UsageError(f"specificity is {specificity}: it lies from -1 to 1")
    if not 0 <= floor <= 1:
        raise UsageError(f"floor is {floor}: it lies from 0 to 1")
    inputs = {context: _inputs_of(context, batches[context]) for context in contexts}
    if all(budget == 1 for budget in budgets.values()):
        measured = equal_importance(module.units(), len(contexts))
    else:
        measured = stack_contexts([measure_group_importance(module, inputs[c], loss, None) for c in contexts])
    kept: dict[UnitKind, BoolArray] = {}
    for name, budget in budgets.items():
        kind = UnitKind(name)
        importance = measured[kind]
        kept[kind] = np.zeros(importance.shape, dtype=np.bool_)
        counts = module.exists(kind).sum(axis=1)
        for count in np.unique(counts):
            layers = np.flatnonzero(counts == count)
            own = allocate(
                contexts,
                {kind: importance[:, layers, :count]},
                {kind: budget},
                core_fractions={kind: 0.5},
                specificity=specificity,
                floor=floor,
            )
            kept[kind][:, layers, :count] = own.kept[kind]
    selection = Selection(contexts, kept)
    module.select(selection)
    return selection


def _inputs_of(context: str, batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The batches one by one; UsageError if there is none."""
    number = -1
    for number, batch in enumerate(batches):
        yield as_inputs(batch, f"batches: {context}[{number}]")
    require(number >= 0, f"batches: {context!r} has none; give one at least")

"""A module with gates in front of every consumer of a group.

    forward(*inputs, context) = model(*inputs), consumers reading  x * table[context, unit of channel]

The model stays the same object with the same names; hooks multiply (`gating`, also how experts are gated). With all
gates at 1 it computes what it computed before. Gates are those of our own decoder (`cpcompile.models.gates`),
so the captured graph freezes in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from cpcompile.core.errors import UsageError
from cpcompile.core.selection import BoolArray, Selection, UnitKind, Units
from cpcompile.partitioning.forms import Outputs
from cpcompile.partitioning.gating import Active, GroupGate, add_gates
from cpcompile.partitioning.groups import Group, Refused
from cpcompile.partitioning.live_parameters import LiveParameters
from cpcompile.partitioning.trace import Forward


class PartitionedModule(nn.Module):
    """`model` with one row of gates per context. Made by `cpcompile.partition`."""

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None,
        *,
        contexts: int,
        groups: tuple[Group, ...],
        refused: tuple[Refused, ...],
        live_parameters: LiveParameters,
        unused: tuple[str, ...],
        outputs: Outputs,
        example_inputs: tuple[Tensor, ...],
        dynamic_shapes: tuple[Any, ...] | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.contexts = contexts
        self.groups = groups
        self.refused = refused
        self.live_parameters = live_parameters
        self.outputs = outputs
        self.unused = unused
        """Parameters that the forward pass does not read: no engine has them."""
        self.example_inputs = example_inputs
        self.dynamic_shapes = dynamic_shapes
        self.gates = nn.ModuleList(GroupGate(contexts, group) for group in groups)
        self._forward = forward
        self._active = Active()
        add_gates(model, self._active, groups, self.group_gates)

    @property
    def group_gates(self) -> Sequence[GroupGate]:
        """The gates, one per group, typed."""
        return cast(Sequence[GroupGate], self.gates)

    def forward(self, *inputs: Tensor, context: Tensor | int) -> Any:
        """The model's output for `inputs` with the gates of `context` (a number, or an int64 scalar)."""
        if isinstance(context, int):
            context = self.gate_row(context)
        return self.with_rows(*inputs, rows=[gate.row(context) for gate in self.group_gates])

    def with_rows(self, *inputs: Any, rows: Sequence[Tensor], forward: Forward | None = None) -> Any:
        """The same with gate values given per group: (units,), or (batch, units) for gates per sequence.

        forward: what is called with the model and `inputs`, if not the function that it was partitioned with.
        """
        forward = forward or self._forward
        with self._active.forward_pass(rows):
            output = self.model(*inputs) if forward is None else forward(self.model, *inputs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._active.keep(rows, inputs, output)
        return output

    def input_names(self) -> list[str]:
        """Names of the inputs except `context`, as in the forward function where they are free there."""
        forward = self.model.forward if self._forward is None else self._forward
        own = inspect.signature(forward).parameters.values()
        named = [p.name for p in own if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = named[0 if self._forward is None else 1 :]
        count = len(self.example_inputs)
        named += [f"input_{number}" for number in range(len(named), count)]
        return self._free(named[:count], {"context"})

    def output_names(self) -> list[str]:
        """Names of the outputs; see `Outputs`."""
        return self._free(self.outputs.names, {"context", *self.input_names()})

    def _free(self, names: Sequence[str], taken: set[str]) -> list[str]:
        """`names`, made longer where a parameter or one of `taken` has the same."""
        taken = taken | {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        found: list[str] = []
        for name in names:
            while name in taken:
                name += "_"
            taken.add(name)
            found.append(name)
        return found

    @property
    def calls(self) -> dict[tuple[str, str], int]:
        """Number of times that the last forward pass applied gates, by group and consumer."""
        return {
            (self.groups[group].name, self.groups[group].consumers[number].module): count
            for (group, number), count in self._active.calls.items()
        }

    def of_kind(self, kind: UnitKind) -> list[int]:
        """Groups of one kind, in the order in which a selection lists them as layers."""
        return [index for index, group in enumerate(self.groups) if group.kind is kind]

    def units(self) -> tuple[Units, ...]:
        """Kinds of units; every group of a kind is a layer. Groups may have fewer units than `count`: see `exists`."""
        found = []
        for kind in dict.fromkeys(group.kind for group in self.groups):
            groups = [self.groups[index] for index in self.of_kind(kind)]
            count, width = max(group.units for group in groups), max(group.width for group in groups)
            found.append(Units(kind=kind, layers=len(groups), count=count, width=width))
        return tuple(found)

    def exists(self, kind: UnitKind) -> BoolArray:
        """(layers, units): which entries of a selection stand for a unit."""
        groups = [self.groups[index] for index in self.of_kind(kind)]
        count = max(group.units for group in groups)
        return np.array([np.arange(count) < group.units for group in groups])

    def gate_row(self, context: int) -> Tensor:
        """The `context` input of `forward` for that context, int64 scalar; UsageError if there is none."""
        if self.contexts == 1:  # one row serves all
            return torch.tensor(0)
        if not 0 <= context < self.contexts:
            raise UsageError(f"there is no context {context}: the model has {self.contexts}, counted from 0")
        return torch.tensor(context)

    def select(self, selection: Selection) -> None:
        """Set every gate to `selection`; gates that stay keep their learned scale. A kind that is absent is whole."""
        self._check(selection)
        for kind in {group.kind for group in self.groups}:
            for layer, index in enumerate(self.of_kind(kind)):
                gate = self.group_gates[index]
                if kind in selection.kept:
                    kept = torch.from_numpy(selection.kept[kind][: self.contexts, layer, : gate.units].copy())
                else:
                    kept = torch.ones(self.contexts, gate.units, dtype=torch.bool)
                gate.select(kept.to(gate.table.device))

    def alive(self, selection: Selection, context: str) -> BoolArray:
        """The units that `context` keeps, over all groups in order."""
        self._check(selection)
        row = selection.row(context)
        parts = [np.ones(group.units, dtype=np.bool_) for group in self.groups]
        for kind in row.keys() & {group.kind for group in self.groups}:
            for layer, index in enumerate(self.of_kind(kind)):
                parts[index] = row[kind][layer, : self.groups[index].units]
        return np.concatenate(parts)

    def kept_sizes(self, selection: Selection, context: str) -> dict[str, int]:
        """Elements of every parameter of the model, by its own name, that `context` keeps."""
        return self.live_parameters.kept(self.alive(selection, context))

    def kept_units(self, selection: Selection, context: str) -> dict[str, tuple[int, ...]]:
        """The units that `context` keeps, by group name; for a mixture of experts, the numbers of the experts."""
        alive = np.split(self.alive(selection, context), np.cumsum([group.units for group in self.groups])[:-1])
        return {group.name: tuple(np.flatnonzero(own).tolist()) for group, own in zip(self.groups, alive, strict=True)}

    def parameter_kind(self, name: str) -> UnitKind | None:
        """The kind of unit whose removal makes the parameter `name` smaller; None if nothing does."""
        return next((group.kind for group in self.groups if name in group.parameters), None)

    def _check(self, selection: Selection) -> None:
        known = {units.kind: (units.layers, units.count) for units in self.units()}
        for kind, table in selection.kept.items():
            if kind in known and table.shape[1:] != known[kind]:
                raise UsageError(f"selection of {kind} has (layers, units) {table.shape[1:]}, the model {known[kind]}")
            if kind not in known and not table.all():
                raise UsageError(f"the selection removes units of kind {kind}, of which the model has none")
            for layer, index in enumerate(self.of_kind(kind)):
                group = self.groups[index]
                for context, row in zip(selection.contexts, table[:, layer, : group.units], strict=True):
                    if row.sum() < group.fewest:
                        raise UsageError(
                            f"{context} keeps {row.sum()} of the {group.units} units of kind {kind} in {group.name}, "
                            f"which needs {group.fewest} for every token; keep at least that many"
                        )


def require_partitioned(module: object) -> None:
    """UsageError unless `module` is what `partition` returns."""
    if not isinstance(module, PartitionedModule):
        raise UsageError(f"a {type(module).__name__} has no gates; give what `partition` returned")

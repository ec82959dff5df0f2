"""Gates at work: hooks that multiply during a forward pass with rows of gates.

    channels and heads    a consumer reads  x * gate[unit of channel]
    experts               the logit of an expert whose gate is 0 is -inf, so that it is never picked and the softmax is
                          over the others; the weight of an expert that is picked is multiplied by its gate

The gate of an expert is a learned scale of what it adds, and its gradient is the importance of the expert.

A backward pass may run modules again (gradient checkpointing, reversible layers). They read the gates of the forward
pass that is being differentiated: the gradient of its output arrives before anything of it is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cpcompile.core.errors import UsageError
from cpcompile.core.selection import UnitKind
from cpcompile.models.gates import Gate
from cpcompile.partitioning.groups import Group


class GroupGate(Gate):
    """The gates of one group, and for each of its consumers the unit of every channel."""

    def __init__(self, contexts: int, group: Group) -> None:
        super().__init__(contexts, group.units, group.width)
        for index, consumer in enumerate(group.consumers):
            # A channel that belongs to no unit reads the 1 that is appended to the row.
            units = np.where(consumer.unit_of_channel < 0, group.units, consumer.unit_of_channel)
            self.register_buffer(f"unit_of_channel_{index}", torch.from_numpy(units), persistent=False)
        self._open = tuple(bool((consumer.unit_of_channel < 0).any()) for consumer in group.consumers)

    def per_channel(self, row: Tensor, consumer: int) -> Tensor:
        """Gate of every channel of a consumer: row (units,) or (batch, units) -> (channels,) or (batch, channels)."""
        if self._open[consumer]:
            row = torch.cat((row, torch.ones_like(row[..., :1])), dim=-1)
        return row.index_select(-1, self.get_buffer(f"unit_of_channel_{consumer}"))


@dataclass
class Active:
    """The forward pass that is running."""

    rows: Sequence[Tensor] | None = None
    """Gate values per group: (units,), or (batch, units) for gates per sequence."""
    again: Sequence[Tensor] | None = None
    """The gates for modules that run again, in a backward pass."""
    calls: dict[tuple[int, int], int] = field(default_factory=dict)
    """(group, consumer) -> number of times that its gates were applied."""
    routers: list[TorchFunctionMode] = field(default_factory=list)
    """The masks of the routers that are running."""

    def row(self, group: int, consumer: int) -> Tensor | None:
        """The gates of a group, where a consumer reads them; counts the call. None outside of the passes."""
        if self.rows is not None:
            self.calls[group, consumer] = self.calls.get((group, consumer), 0) + 1
            return self.rows[group]
        return _renewed(self.again[group]) if self.again is not None and _in_backward() else None

    @contextmanager
    def forward_pass(self, rows: Sequence[Tensor]) -> Iterator[None]:
        """Consumers read `rows`."""
        before, self.rows = self.rows, rows
        self.calls.clear()
        if not _in_backward():
            self.again = None  # of a backward pass that failed
        try:
            yield
        finally:
            self.rows = before

    def keep(self, rows: Sequence[Tensor], inputs: object, outputs: object) -> None:
        """Let modules that run again while `outputs` are differentiated read `rows`."""
        given = {id(value) for value in pytree.tree_leaves(inputs)}
        for value in pytree.tree_leaves(outputs):
            if isinstance(value, Tensor) and value.grad_fn is not None and id(value) not in given:
                value.register_hook(lambda _: self._differentiate(rows))  # type: ignore[no-untyped-call]

    def _differentiate(self, rows: Sequence[Tensor]) -> None:
        self.again = rows
        Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        self.again = None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() >= 0


def _renewed(row: Tensor) -> Tensor:
    """`row` as a leaf that passes its gradient on: each segment differentiates `row` by itself, and frees no graph."""
    if row.grad_fn is None:
        return row
    leaf = row.detach().requires_grad_()
    pass_on = partial(torch.autograd.backward, row, retain_graph=True)
    leaf.register_hook(pass_on)  # type: ignore[no-untyped-call]
    return leaf


@dataclass(frozen=True)
class Hook:
    """The gates of `consumer`, a number in its `group`, at `module`."""

    active: Active
    gate: GroupGate
    group: int
    consumer: int
    module: str

    def row(self) -> Tensor:
        """The gates of the group in the pass that is running."""
        row = self.active.row(self.group, self.consumer)
        if row is None:
            raise UsageError(f"{self.module} has gates: call the PartitionedModule, with a context")
        return row


@dataclass(frozen=True)
class Multiply(Hook):
    """Multiplies the first input of a consumer, whose channels lie along `axis`."""

    axis: int

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        row, x = self.row(), inputs[0]
        scale = self.gate.per_channel(row, self.consumer)
        shape = [1] * x.ndim
        shape[self.axis] = scale.shape[-1]
        if scale.ndim == 2:
            if x.shape[0] != scale.shape[0]:
                raise _no_batch(self.module, x)
            shape[0] = scale.shape[0]
        return (x * scale.reshape(shape).to(x.dtype), *inputs[1:])


@dataclass(frozen=True)
class Route(Hook):
    """Masks the result of a router's linear layer with the weight `parameter` while the router runs."""

    parameter: str

    def __call__(self, module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        mask = _MaskLogits(self.module, module.get_parameter(self.parameter), self.row())
        mask.__enter__()  # type: ignore[no-untyped-call]
        self.active.routers.append(mask)

    def leave(self, _module: nn.Module, _inputs: tuple[Any, ...], _output: object) -> None:
        """The forward pass of the router is over, or has failed."""
        if self.active.routers:
            self.active.routers.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _MaskLogits(TorchFunctionMode):
    """Puts -inf where the gate is 0 in the result of linear(x, weight)."""

    def __init__(self, module: str, weight: Tensor, row: Tensor) -> None:
        super().__init__()
        self.module, self.weight, self.row = module, weight, row

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear or not any(value is self.weight for value in args[1:2]):
            return result
        row = self.row
        if row.ndim == 2:
            if result.shape[0] % row.shape[0]:
                raise _no_batch(self.module, result)
            row = row.repeat_interleave(result.shape[:-1].numel() // row.shape[0], dim=0).reshape(result.shape)
        return torch.where(row == 0, -torch.inf, result)


@dataclass(frozen=True)
class Weigh(Hook):
    """Multiplies the weights of the experts that were picked, given the numbers of these experts."""

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        row, given = self.row(), [*inputs, *named.values()]
        numbers = next(value for value in given if isinstance(value, Tensor) and not value.is_floating_point())
        if row.ndim == 1:
            scale = nn.functional.embedding(numbers, row.unsqueeze(-1)).squeeze(-1)
        else:
            if numbers.shape[0] % row.shape[0]:
                raise _no_batch(self.module, numbers)
            scale = row.gather(1, numbers.reshape(row.shape[0], -1)).reshape(numbers.shape)

        def weighed(value: Any) -> Any:
            own = isinstance(value, Tensor) and value.is_floating_point() and value.shape == numbers.shape
            return value * scale.to(value.dtype) if own else value

        return tuple(map(weighed, inputs)), {name: weighed(value) for name, value in named.items()}


def add_gates(model: nn.Module, active: Active, groups: Sequence[Group], gates: Sequence[GroupGate]) -> None:
    """Hook the gates of all groups into `model`."""
    for index, (group, gate) in enumerate(zip(groups, gates, strict=True)):
        if group.kind is UnitKind.EXPERT:
            router, experts = group.consumers
            module, parameter = model.get_submodule(router.module), router.parameter.rpartition(".")[2]
            route = Route(active, gate, index, 0, router.module, parameter)
            module.register_forward_pre_hook(route)
            module.register_forward_hook(route.leave, always_call=True)
            weigh = Weigh(active, gate, index, 1, experts.module)
            model.get_submodule(experts.module).register_forward_pre_hook(weigh, with_kwargs=True)
            continue
        for number, consumer in enumerate(group.consumers):
            multiply = Multiply(active, gate, index, number, consumer.module, consumer.axis)
            model.get_submodule(consumer.module).register_forward_pre_hook(multiply)


def has_gates(model: nn.Module) -> bool:
    """Whether `add_gates` has been applied to `model`."""
    return any(isinstance(hook, Hook) for module in model.modules() for hook in module._forward_pre_hooks.values())


def _no_batch(module: str, value: Tensor) -> UsageError:
    return UsageError(
        f"{module}: gates per sequence need the batch as first axis of its input, got {tuple(value.shape)}"
    )

"""Trace: a torch module as an exported graph, with channel ids on every parameter axis."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from cpcompile.core.errors import UsageError
from cpcompile.partitioning.channel_ids import ChannelIds
from cpcompile.partitioning.flow import Flow
from cpcompile.partitioning.rules import propagate

Forward = Callable[..., Any]
"""forward(model, *inputs) -> output: how to call a model whose own forward function has other inputs or outputs."""


class Call(nn.Module):
    """`model` with one signature, forward(*inputs)."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs) if self._forward is None else self._forward(self.model, *inputs)


@dataclass
class Traced:
    """A graph and the channel ids that were carried through it."""

    model: nn.Module
    graph: fx.Graph
    flow: Flow
    parameters: Mapping[str, Tensor]
    """Parameters by the model's own names; one with several names appears under the first."""
    parameter_axes: Mapping[str, tuple[ChannelIds | None, ...]]
    """Parameter -> per axis the ids of its positions; None for an axis of length 1."""
    placeholders: Mapping[fx.Node, str] = field(default_factory=dict)

    def parameter_of(self, node: fx.Node) -> str | None:
        """The parameter that `node` is, or is a view of."""
        while node not in self.placeholders:
            if node.op != "call_function" or len(node.all_input_nodes) != 1:
                return None
            node = node.all_input_nodes[0]
        return self.placeholders[node]


def trace(
    model: nn.Module, inputs: tuple[Tensor, ...], forward: Forward | None, dynamic_shapes: tuple[Any, ...] | None
) -> Traced:
    """Export `model` in evaluation mode and carry ids through the graph; UsageError says why it cannot be exported."""
    try:
        with quiet():
            program = torch.export.export(
                Call(model, forward).eval(),
                inputs,
                dynamic_shapes=None if dynamic_shapes is None else {"inputs": dynamic_shapes},
                strict=False,
            )
    except Exception as error:  # of any kind: torch.export runs the model's own code
        raise UsageError(
            f"{type(model).__name__}: torch.export cannot export it: {reason_of(error)}; "
            "make the example inputs, dynamic_shapes and forward fit the model"
        ) from error
    signature = program.graph_signature
    names = {id(tensor): name for name, tensor in reversed(list(model.named_parameters(remove_duplicate=False)))}
    parameters = dict(model.named_parameters())
    flow = Flow()
    axes: dict[str, tuple[ChannelIds | None, ...]] = {}
    for name, tensor in parameters.items():
        axes[name] = tuple(flow.coupling.fresh((n,)) if n > 1 else None for n in tensor.shape)
    placeholders: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            example = node.meta["val"]
            target = signature.inputs_to_parameters.get(node.name)
            constant = target is not None or node.name in signature.inputs_to_buffers
            constant = constant or node.name in signature.inputs_to_lifted_tensor_constants
            if not isinstance(example, Tensor):
                continue
            value = flow.plain(example, constant=constant)
            if target is not None:
                name = names[id(program.state_dict[target])]
                placeholders[node] = name
                own = [_along(ids, axis, value.rank) for axis, ids in enumerate(axes[name]) if ids is not None]
                value = value.with_ids(own)
            flow.values[node] = value
        elif node.op == "call_function":
            flow.values[node] = propagate(flow, node)
        elif node.op == "output":
            flow.block_all(flow.tensors(node), "it is an output of the model")
    return Traced(model, program.graph, flow, parameters, axes, placeholders)


def reason_of(error: Exception) -> str:
    """The first line of what `error` says, or its type; and what torch.export suggests."""
    text, _, suggested = str(error).partition("Suggested fixes:")
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    fix = next((line.strip() for line in suggested.splitlines() if line.strip()), "")
    return f"{first.rstrip('.')}; torch.export suggests {fix}" if fix else first


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose elements `node` reads: of some it needs the shape or the type alone."""
    name = str(node.target).removeprefix("aten.").split(".")[0] if node.op == "call_function" else ""
    if name in _READS_NO_ELEMENTS:
        return []
    return node.all_input_nodes[:1] if name in _READS_THE_FIRST else node.all_input_nodes


_READS_NO_ELEMENTS = frozenset(
    [
        *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "sym_size", "sym_numel", "sym_stride"),
    ]
)
_READS_THE_FIRST = frozenset(["expand_as", "view_as", "reshape_as", "type_as"])


def _along(ids: ChannelIds, axis: int, rank: int) -> ChannelIds:
    return ids.reshape([-1 if a == axis else 1 for a in range(rank)])


@contextmanager
def quiet() -> Iterator[None]:
    """Silence exporters, which log and warn about packages that are not needed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # a graph is printed when torch.export fails
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

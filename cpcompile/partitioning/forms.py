"""Forms of modules, inputs and outputs: what has no way to an engine is refused, with the way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cpcompile.core.errors import UsageError

FLOATS = (torch.float32, torch.float64)
"""Types of floating point that inputs and outputs may have."""
FORWARD = "forward=lambda model, *inputs: …"


@dataclass(frozen=True)
class Outputs:
    """The tensors that a model gives, in the order of its nested containers; None is left out."""

    names: tuple[str, ...]
    """The keys of a dict, otherwise output, or output_0, output_1, …"""
    cloned: tuple[bool, ...]
    """Which of them are also an input, a parameter or an earlier output: an engine gives each value once."""

    def of(self, output: object) -> tuple[Tensor, ...]:
        """The tensors in `output`, each a value of its own."""
        return tuple(t.clone() if clone else t for t, clone in zip(_tensors(output), self.cloned, strict=True))


def outputs_of(model: nn.Module, output: object, graph: fx.Graph) -> Outputs:
    """Those of `model`, whose graph this is; UsageError if one cannot be the output of an engine."""
    name = type(model).__name__
    for number, leaf in enumerate(pytree.tree_leaves(output)):
        if leaf is not None and not isinstance(leaf, Tensor):
            kind = type(leaf).__name__
            raise UsageError(f"{name}: output {number} is a {kind}, not a tensor; leave it out: {FORWARD}")
    tensors = _tensors(output)
    if not tensors:
        raise UsageError(f"{name}: gives no tensor; return one: {FORWARD}")
    names = ["output"] if len(tensors) == 1 else [f"output_{number}" for number in range(len(tensors))]
    if isinstance(output, dict):
        keys = [str(key) for key, value in output.items() if value is not None]
        names = keys if len(keys) == len(tensors) else names
    for key, tensor in zip(names, tensors, strict=True):
        if why := _unfit(tensor):
            raise UsageError(f"{name}: {key} {why}: {FORWARD}")
    (end,) = (node for node in graph.nodes if node.op == "output")
    nodes = [node for node in pytree.tree_leaves(end.args[0]) if isinstance(node, fx.Node)]
    again = [node.op == "placeholder" or node in nodes[:number] for number, node in enumerate(nodes)]
    return Outputs(tuple(names), tuple(again))


def require_supported(model: object, inputs: Sequence[Tensor]) -> None:
    """UsageError if `model` is no plain module, or if it or its inputs hold tensors that no engine can hold."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model is a {name}: a torch.nn.Module is needed; if it was made from one, partition that module"
        )
    for path, module in model.named_modules():
        if why := _wrapped(module):
            raise UsageError(f"{f'{name}: {path}' if path else name} {why}")
    for path, parameter in model.named_parameters():
        if why := _unfit(parameter, (torch.float32,)):
            raise UsageError(f"{name}: {path} {why}: model.float().cpu()")
    for path, buffer in model.named_buffers():
        if why := _unfit(buffer, (*FLOATS, torch.complex64)):
            raise UsageError(f"{name}: {path} {why}: model.float().cpu()")
    for number, value in enumerate(inputs):
        if why := _unfit(value):
            raise UsageError(f"{name}: input {number} {why}: {FORWARD}")


def _tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _wrapped(module: nn.Module) -> str | None:
    """Why a module is not the one that a user wrote."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is a ScriptModule, which torch.export cannot read; partition the Python module that it was made from"
    if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
        return "is compiled; partition the module before torch.compile, and compile the PartitionedModule"
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or _SHARDED in module._modules:
        return f"is wrapped by {type(module).__name__}; partition what it wraps, and wrap the PartitionedModule"
    return None


_SHARDED = "_fsdp_wrapped_module"


def _unfit(tensor: Tensor, types: Sequence[torch.dtype] = FLOATS) -> str | None:
    """Why an engine cannot hold a tensor; None if it can. `types`: those of floating point that are allowed."""
    if is_lazy(tensor):
        return "has no shape yet; run the model once before"
    wrapper: bool = is_traceable_wrapper_subclass(tensor)
    if wrapper or tensor.layout is not torch.strided or tensor.is_quantized:
        return f"is a {type(tensor).__name__} of layout {tensor.layout}; make it an ordinary tensor"
    if tensor.device.type != "cpu":
        return f"is on {tensor.device}; models are partitioned on the CPU, and may move afterwards"
    if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in types:
        return f"is of {tensor.dtype}; convert it to torch.float32"
    return None

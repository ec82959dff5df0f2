"""Capture: a partitioned module as one dynamic ONNX graph; parameters keep the model's own names."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch

from cpcompile.core.errors import CpcompileError
from cpcompile.partitioning.partitioned_module import PartitionedModule
from cpcompile.partitioning.trace import quiet

if TYPE_CHECKING:
    import onnx_ir as ir  # not at run time: a pretrained model that only runs is measured without it


def capture_partitioned(module: PartitionedModule, *, opset: int = 23) -> ir.Model:
    """The dynamic graph of `module`: any context, full cost. Inputs are named as in its forward function."""
    dynamic = None
    if module.dynamic_shapes is not None:
        dynamic = {"inputs": module.dynamic_shapes, "context": None}
    with quiet():
        program = torch.onnx.export(
            module.eval(),
            module.example_inputs,
            kwargs={"context": torch.tensor(0)},
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            input_names=[*input_names(module), "context"],
            dynamic_shapes=dynamic,
        )
    if program is None:
        raise CpcompileError("torch.onnx.export gave no program; this torch is not supported")
    captured: ir.Model = program.model
    own_names = {id(tensor): name for name, tensor in module.model.named_parameters()}
    tensors = dict(module.named_parameters(remove_duplicate=False))
    for name, value in list(captured.graph.initializers.items()):
        if name in tensors and id(tensors[name]) in own_names:  # a tied parameter goes by the first of its names
            value.name = own_names[id(tensors[name])]
        elif name.startswith("model."):
            value.name = name.removeprefix("model.")
    parameters = {name for name, _ in module.model.named_parameters()}
    missing = parameters - set(captured.graph.initializers)
    if missing:
        raise CpcompileError(f"capture lost the parameters {', '.join(sorted(missing))}; this is a defect of cpcompile")
    return captured


def input_names(module: PartitionedModule) -> list[str]:
    """Names of the inputs but `context`."""
    forward = module._forward
    names = list(inspect.signature(module.model.forward if forward is None else forward).parameters)
    return names[0 if forward is None else 1 :][: len(module.example_inputs)]

"""Capture: an eager or exported model -> one dynamic graph for all contexts.

The graph of a language model has the inputs `input_ids` (batch, sequence) and `context` (int64 scalar). Gates are
ordinary Gather and Mul, and parameters keep the model's own names: what is removed later is accounted for by these
names. The exporter's own optimiser is off because it renames and merges them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import ExportedProgram

from cpcompile.core.config import OPSETS
from cpcompile.core.errors import CpcompileError
from cpcompile.models.language_model import LanguageModel
from cpcompile.partitioning.trace import quiet, sources_of


def capture(model: LanguageModel, *, opset: int = OPSETS[-1]) -> ir.Model:
    """The dynamic graph of a gated model; any context, full cost."""
    return _capture(model, {"context": torch.tensor(0)}, opset)


def capture_dense(model: LanguageModel, *, opset: int = OPSETS[-1]) -> ir.Model:
    """The graph of an ungated model: what a plain export of the dense baseline gives."""
    return _capture(model, {}, opset)


def _capture(model: LanguageModel, context: dict[str, torch.Tensor], opset: int) -> ir.Model:
    ids = torch.zeros((2, 16), dtype=torch.int64)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    return export_graph(
        model.eval(),
        (ids, *context.values()),
        {name: first[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)},
        opset=opset,
        input_names=["input_ids", *context],
        output_names=["logits"],
        dynamic_shapes=(dynamic, *(None for _ in context)),
    )


def export_graph(
    model: nn.Module | ExportedProgram,
    inputs: tuple[torch.Tensor, ...],
    own_names: Mapping[str, str],
    *,
    opset: int,
    absent: Collection[str] = (),
    **options: Any,
) -> ir.Model:
    """The graph that torch.onnx.export makes of `model`, with parameters under their own names.

    own_names: name of a parameter in the export -> its own name; a parameter under two names goes by the first.
    absent: own names of parameters that the exporter may leave out, as those without elements.
    options: further arguments of torch.onnx.export, such as the names of inputs and outputs.
    """
    with quiet():
        program = torch.onnx.export(
            model, inputs, dynamo=True, optimize=False, verbose=False, opset_version=opset, **options
        )
    if program is None:
        raise CpcompileError("torch.onnx.export gave no program; this torch is not supported")
    captured: ir.Model = program.model
    _rename_results(captured.graph, set(own_names.values()))
    own = [(value, own_names[name]) for name, value in captured.graph.initializers.items() if name in own_names]
    for number, (value, _) in enumerate(own):  # one may have the name that another is going to have
        value.name = f"parameter:{number}"
    for value, name in own:
        value.name = name
    read = {own_names[name] for name in _parameters_read(program.exported_program) if name in own_names}
    missing = read - set(captured.graph.initializers) - set(absent)
    if missing:
        raise CpcompileError(f"capture lost the parameters {', '.join(sorted(missing))}; this is a defect of cpcompile")
    return captured


def _rename_results(graph: ir.Graph, names: Collection[str]) -> None:
    """Rename the results of nodes that have one of `names`."""
    taken = {value.name for node in graph.all_nodes() for value in node.outputs} | set(names)
    outputs = set(graph.outputs)
    for value in (value for node in graph.all_nodes() for value in node.outputs):
        name = value.name
        if name is not None and name in names and value not in outputs:
            while name in taken:
                name += "_"
            value.name = name
            taken.add(name)


def _parameters_read(program: ExportedProgram | None) -> set[str]:
    """The parameters whose elements have a part in the outputs of `program`."""
    if program is None:
        return set()
    (end,) = (node for node in program.graph.nodes if node.op == "output")
    waiting, seen = [end], {end}
    while waiting:
        found = [node for node in sources_of(waiting.pop()) if node not in seen]
        seen.update(found)
        waiting += found
    parameters = program.graph_signature.inputs_to_parameters
    return {parameters[node.name] for node in seen if node.name in parameters}

"""Capture: an eager or exported model -> one dynamic graph for all contexts.

The graph of a language model has the inputs and outputs of `core.cache` and `context` (int64 scalar). Gates are
ordinary Gather and Mul, and parameters keep the model's own names: what is removed later is accounted for by these
names. The exporter's own optimiser is off because it renames and merges them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cpcompile.core.cache import (
    INPUT,
    KEEP,
    LENGTH,
    MASK,
    OUTPUT,
    PARTS,
    POSITIONS,
    LayerCache,
    past_name,
    present_name,
)
from cpcompile.core.config import OPSETS
from cpcompile.core.errors import CpcompileError
from cpcompile.models.language_model import LanguageModel
from cpcompile.partitioning.trace import quiet, sources_of

CONTEXT = "context"
PAST_TOKENS = 5
"""Of the examples that are traced; no other length is 5."""
TOTAL = "total"
AXES: Mapping[str, Sequence[str]] = {
    INPUT: ("batch", "sequence"),
    MASK: ("batch", TOTAL),
    POSITIONS: ("batch", "sequence"),
    OUTPUT: ("batch", "kept"),
}
"""Names of the symbolic axes; those of the cache are (batch, heads, past, head_dim)."""


def capture(model: LanguageModel, *, opset: int = OPSETS[-1], cached: bool = False) -> ir.Model:
    """The dynamic graph of a gated model, with its cache if that is wanted and it has one; any context, full cost."""
    caches = model.caches() if cached else None
    return _capture(model, torch.tensor(0), opset) if caches is None else _capture_cached(model, caches, opset)


def capture_dense(model: LanguageModel, *, opset: int = OPSETS[-1], cached: bool = False) -> ir.Model:
    """The graph of an ungated model, as `capture`: what a plain export of the dense baseline gives."""
    caches = model.caches() if cached else None
    return _capture(model, None, opset) if caches is None else _capture_cached(model, caches, opset)


def _capture(model: LanguageModel, context: torch.Tensor | None, opset: int) -> ir.Model:
    ids = torch.zeros((2, 16), dtype=torch.int64)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    return export_graph(
        model.eval(),
        (ids,) if context is None else (ids, context),
        _own_names(model),
        opset=opset,
        input_names=[INPUT] if context is None else [INPUT, CONTEXT],
        output_names=[OUTPUT],
        dynamic_shapes=(dynamic,) if context is None else (dynamic, None),
    )


def _own_names(model: nn.Module) -> Mapping[str, str]:
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    return {name: first[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}


def _capture_cached(model: LanguageModel, caches: Sequence[LayerCache], opset: int) -> ir.Model:
    tokens = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    parts = [(layer, part) for layer in range(len(caches)) for part in PARTS]
    gated = [CONTEXT] if model.contexts else []
    past = [torch.zeros((2, caches[layer].heads, PAST_TOKENS, caches[layer].head_dim)) for layer, _ in parts]
    with _decoding(model.eval()):
        captured = export_graph(
            model,
            (
                torch.zeros((2, 16), dtype=torch.int64),
                torch.ones((2, 16 + PAST_TOKENS), dtype=torch.int64),
                torch.arange(PAST_TOKENS, 16 + PAST_TOKENS).repeat(2, 1),
                torch.tensor(4),
                *(torch.tensor(0) for _ in gated),
                *past,
            ),
            _own_names(model),
            opset=opset,
            input_names=[INPUT, MASK, POSITIONS, KEEP, *gated, *(past_name(*each) for each in parts)],
            output_names=[OUTPUT, *(present_name(*each) for each in parts)],
            dynamic_shapes=(
                tokens,
                tokens,
                tokens,
                None,
                (*(None for _ in gated), *({0: Dim.DYNAMIC, LENGTH: Dim.DYNAMIC} for _ in past)),
            ),
        )
    _name_axes(captured.graph)
    return captured


@contextmanager
def _decoding(model: LanguageModel) -> Iterator[None]:
    """`model.forward` takes and gives flat tensors, in the order of the graph; a module around it would rename all."""

    def forward(
        self: LanguageModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        context, past = (rest[0], rest[1:]) if self.contexts else (None, rest)
        pairs = list(zip(past[::2], past[1::2], strict=True))
        logits, present = self.decode(input_ids, attention_mask, position_ids, logits_to_keep, pairs, context)
        return logits, *(tensor for pair in present for tensor in pair)

    model.forward = MethodType(forward, model)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward


def _name_axes(graph: ir.Graph) -> None:
    """Give the symbolic axes of all values names that mean something, in place of the exporter's s10 and s70 + s81."""
    names: dict[str, str] = {}
    for value in (*graph.inputs, *graph.outputs):
        axes = AXES.get(value.name or "", ("batch", None, "past", None))
        for length, name in zip(value.shape or (), axes, strict=False):
            if isinstance(length, ir.SymbolicDim) and length.value is not None and name is not None:
                names.setdefault(str(length.value), name)
    for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(d if isinstance(d, int) else _axis(str(d.value), names) for d in value.shape)


def _axis(symbol: str, names: Mapping[str, str]) -> str | None:
    known = {names.get(part) for part in symbol.split(" + ")}
    return TOTAL if known == {"past", "sequence"} else names.get(symbol)


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

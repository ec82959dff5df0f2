"""`model.pt2`: a `torch.export` program with gates, and the record that a build needs of them.

    save_program(partitioned, selection, "model.pt2", examples={"de": [...], "fr": [...]})
    program = load_program(Path("model.pt2"))

The archive is what `torch.export.save` writes, with two more files: `cpcompile.json` (contexts, names, what each
context keeps) and `examples.npz.base64` (real inputs per context). Loading runs none of the code that such an archive
can contain: torch.export.load itself unpickles and evaluates expressions, so the archive is inspected first.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from cpcompile.core.coercion import as_path, require
from cpcompile.core.config import require_context_name
from cpcompile.core.errors import UsageError
from cpcompile.core.selection import Digits, Selection, UnitKind
from cpcompile.core.types import Array, Feeds
from cpcompile.files.whole_files import require_file_path, whole_file
from cpcompile.frontend.capture import export_graph
from cpcompile.frontend.program_archive import EXAMPLES, FORMAT, RECORD, VERSION, damaged, inspect_program
from cpcompile.partitioning.arguments import as_inputs
from cpcompile.partitioning.partitioned_module import PartitionedModule, require_partitioned
from cpcompile.partitioning.trace import quiet


@dataclass(frozen=True, kw_only=True)
class Program:
    """An exported program that takes its inputs and a context, and what its contexts keep."""

    exported: ExportedProgram
    contexts: tuple[str, ...]
    inputs: tuple[str, ...]
    """Names of the inputs except `context`, in order."""
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]
    """Names of the dynamic axes, by input."""
    parameters: Mapping[str, str]
    """The model's own name of every parameter of the program; a tied parameter has its first name."""
    kept: Mapping[str, Mapping[str, int]]
    """context -> parameter -> elements that the context keeps."""
    kinds: Mapping[str, UnitKind]
    """The kind of unit whose removal makes a parameter smaller."""
    examples: Mapping[str, tuple[Feeds, ...]]
    selection: Digits | None
    """`Selection.digits`, one layer per group; None if the file has none."""
    unused: tuple[str, ...] = ()
    """Parameters that the forward pass does not read; the graph does not have them."""

    def parameter_sizes(self) -> dict[str, int]:
        """Elements of every parameter except the gates, by name."""
        return {own: self.exported.state_dict[name].numel() for name, own in self.parameters.items()}

    @cached_property
    def lengths(self) -> dict[str, tuple[int, int]]:
        """Shortest and longest length of every named axis whose length does not depend on another."""
        found = {}
        nodes = {node.name: node for node in self.exported.graph.nodes if node.op == "placeholder"}
        for name, user in zip(self.inputs, self.exported.graph_signature.user_inputs, strict=False):
            for axis, label in self.axes.get(name, {}).items():
                size = nodes[str(user)].meta["val"].shape[axis]
                bounds = self.exported.range_constraints.get(size.node.expr) if hasattr(size, "node") else None
                if bounds is not None:
                    high = int(bounds.upper) if bounds.upper < sys.maxsize else sys.maxsize  # two infinities occur
                    found[label] = (max(int(bounds.lower), 1), high)
        return found

    def eager(
        self, context: str, *, double: bool = False, compiled: bool = False
    ) -> Callable[[Feeds], dict[str, Array]]:
        """The program with the gates of `context` as a function of numpy arrays.

        It computes in float32, or in float64 if `double`; `compiled` runs it through torch.compile.
        """
        module: Callable[..., Any] = self._double if double else self._compiled if compiled else self._single
        index = torch.tensor(self.contexts.index(context))

        def run(feeds: Feeds) -> dict[str, Array]:
            tensors = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self.inputs]
            if double:
                tensors = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
            with torch.inference_mode():
                leaves = pytree.tree_leaves(module(*tensors, context=index))
            return {name: leaf.numpy() for name, leaf in zip(self.outputs, leaves, strict=True)}

        return run

    def capture(self, *, opset: int) -> ir.Model:
        """The dynamic graph; inputs, outputs and parameters go by their own names."""
        captured = export_graph(
            self.exported,
            (),
            self.parameters,
            opset=opset,
            absent=[*self.unused, *(name for name, size in self.parameter_sizes().items() if not size)],
            input_names=[*self.inputs, "context"],
            output_names=list(self.outputs),
        )
        _name_axes(captured.graph, self.axes)
        return captured

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self._single, dynamic=True)

    @cached_property
    def _single(self) -> fx.GraphModule:
        return self.exported.module(check_guards=False)

    @cached_property
    def _double(self) -> fx.GraphModule:
        """The program in float64, including the casts to float32 inside the graph."""
        with quiet():
            module = copy.deepcopy(self._single).double()
        for part in module.modules():  # regions without autocast, for example, are graphs of their own
            for name, value in list(part.__dict__.items()):
                if isinstance(value, Tensor) and value.dtype is torch.float32:
                    setattr(part, name, value.double())
            if isinstance(part, fx.GraphModule):
                for node in part.graph.nodes:
                    if node.op == "call_function":
                        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _doubled)
                part.recompile()
        return module


class _Flat(nn.Module):
    """`module` with its outputs as a plain tuple of tensors."""

    def __init__(self, module: PartitionedModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return self.module.outputs.of(self.module(*inputs, context=context))


def save_program(
    module: PartitionedModule,
    selection: Selection,
    path: str | PathLike[str],
    *,
    examples: Mapping[str, Sequence[tuple[Tensor, ...]]] | None = None,
) -> None:
    """Set the gates of `module` to `selection` and write it as a program that `cpcompile build` takes.

    examples: real inputs per context, on which engines are compared with the model; by default its example inputs.
    UsageError: contexts that do not fit, a model that cannot be exported, a path that is not a .pt2 file.
    """
    target = require_file_path(as_path(path, "save_program"), ".pt2")
    require_partitioned(module)
    require(isinstance(selection, Selection), f"a {type(selection).__name__} is no selection; `select_units` makes one")
    if len(selection.contexts) != module.contexts:
        raise UsageError(f"the module has gates for {module.contexts} contexts, the selection {selection.contexts}")
    for context in selection.contexts:
        require_context_name(context, "selection")
    for context, given in (examples or {}).items():
        if context not in selection.contexts:
            raise UsageError(f"examples of {context!r}, which is none of {', '.join(selection.contexts)}")
        if not given:
            raise UsageError(f"examples of {context!r} are none; give one at least, or leave the context out")
    given_inputs = {
        context: [as_inputs(inputs, f"examples: {context}[{number}]") for number, inputs in enumerate(given)]
        for context, given in (examples or {}).items()
    }
    module.eval().select(selection)
    dynamic, flat = module.dynamic_shapes, _Flat(module)
    try:
        with quiet():
            program = torch.export.export(
                flat,
                module.example_inputs,
                kwargs={"context": torch.tensor(0)},
                dynamic_shapes=None if dynamic is None else {"inputs": dynamic, "context": None},
                strict=False,
            )
    except Exception as error:  # any kind of error: torch.export runs the model's own code
        raise UsageError(f"{type(module.model).__name__}: torch.export cannot export it with gates: {error}") from error
    for context, given in given_inputs.items():
        for number, inputs in enumerate(given):
            wrong = _misfit(program, inputs)
            require(not wrong, f"examples: {context}[{number}]: {wrong}")
    own_names = {id(tensor): name for name, tensor in reversed(list(module.model.named_parameters()))}
    every = dict(flat.named_parameters(remove_duplicate=False))
    names = module.input_names()
    record = {
        "format": FORMAT,
        "version": VERSION,
        "contexts": selection.contexts,
        "inputs": names,
        "outputs": module.output_names(),
        "axes": _axis_names(names, dynamic),
        "parameters": {n: own_names[id(every[n])] for n in program.state_dict if id(every.get(n)) in own_names},
        "unused": module.unused,
        "kept": {context: module.kept_sizes(selection, context) for context in selection.contexts},
        "selection": selection.digits(
            {kind: [(g.name, g.units) for g in module.groups if g.kind is kind] for kind in selection.kept}
        ),
        "kinds": {name: kind for name in own_names.values() if (kind := module.parameter_kind(name)) is not None},
    }
    arrays = {
        f"{context}/{number}/{name}": tensor.detach().numpy()
        for context in selection.contexts
        for number, inputs in enumerate(given_inputs.get(context, [module.example_inputs]))
        for name, tensor in zip(names, inputs, strict=True)
    }
    packed = io.BytesIO()
    np.savez(packed, **arrays)  # type: ignore[arg-type]
    with whole_file(target) as temporary, temporary.open("wb") as file, quiet():
        extra = {RECORD: json.dumps(record), EXAMPLES: base64.b64encode(packed.getvalue()).decode()}
        torch.export.save(program, file, extra_files=extra)


def load_program(path: Path) -> Program:
    """Read `path`; UsageError says what is wrong with it and what to do."""
    record, examples = inspect_program(path)
    try:
        with path.open("rb") as file, quiet():
            exported = torch.export.load(file)
        exported._guards_code = []  # Python, which a decomposition would execute
    except Exception as error:  # any kind of error, from the depths of a deserialiser
        raise damaged(path, error) from error
    try:
        program = Program(
            exported=exported,
            contexts=tuple(record["contexts"]),
            inputs=tuple(record["inputs"]),
            outputs=tuple(record["outputs"]),
            axes={name: {int(axis): label for axis, label in axes.items()} for name, axes in record["axes"].items()},
            parameters=record["parameters"],
            kept=record["kept"],
            kinds={name: UnitKind(kind) for name, kind in record["kinds"].items()},
            examples=examples,
            selection=record.get("selection"),
            unused=tuple(record.get("unused", ())),
        )
        _require_consistent(program)
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise UsageError(f"{path}: {RECORD} in it is malformed ({error}); save it again") from error
    return program


def _require_consistent(program: Program) -> None:
    """ValueError or TypeError unless the record has the form that `save_program` gives it."""
    for context in program.contexts:
        require_context_name(context, "contexts")
    if not program.contexts or len(set(program.contexts)) < len(program.contexts):
        raise ValueError(f"contexts {list(program.contexts)} are none or not distinct")
    sizes = program.parameter_sizes()
    if not sizes.keys() >= set(program.unused):
        raise ValueError("unused parameters that the program does not have")
    for context in program.contexts:
        kept = program.kept[context]
        if kept.keys() != sizes.keys() or any(not 0 <= int(kept[name]) <= sizes[name] for name in sizes):
            raise ValueError(f"what {context} keeps does not fit the parameters")
        for feeds in program.examples[context]:
            if feeds.keys() != set(program.inputs):
                raise ValueError(f"an example of {context} has the inputs {sorted(feeds)}")
            if wrong := _misfit(program.exported, [torch.from_numpy(feeds[name]) for name in program.inputs]):
                raise ValueError(f"an example of {context}: {wrong}")
    for layer in (layer for layers in (program.selection or {}).values() for layer in layers):
        rows = [layer["kept"][context] for context in program.contexts]
        if not all(re.fullmatch("[01]+", digits) and len(digits) == len(rows[0]) for digits in rows):
            raise ValueError(f"the selection of {str(layer['name'])!r} is not a digit per unit")
    users = len(program.exported.graph_signature.user_inputs)
    if users != len(program.inputs) + 1 or len(program.exported.graph_signature.user_outputs) != len(program.outputs):
        raise ValueError("names of inputs or outputs do not fit the program")


def _misfit(program: ExportedProgram, inputs: Sequence[Tensor]) -> str:
    """Which of the inputs has a type or shape that the program does not take; empty if none has."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    lengths: dict[Any, int] = {}
    for number, (user, given) in enumerate(zip(program.graph_signature.user_inputs, inputs, strict=False)):
        expected = nodes[str(user)].meta["val"]
        form = f"input {number} is {given.dtype} {list(given.shape)}, and the program takes"
        if given.dtype is not expected.dtype or given.dim() != expected.dim():
            return f"{form} {expected.dtype} {list(expected.shape)}"
        for size, length in zip(expected.shape, given.shape, strict=True):
            if isinstance(size, int):
                fits = size == length
            else:
                bounds = program.range_constraints.get(size.node.expr)
                fits = lengths.setdefault(size.node.expr, length) == length
                fits = fits and (bounds is None or bounds.lower <= length <= bounds.upper)
            if not fits:
                return f"{form} {expected.dtype} {list(expected.shape)}"
    return ""


def _axis_names(inputs: Sequence[str], dynamic: tuple[Any, ...] | None) -> dict[str, dict[str, str]]:
    named: dict[str, dict[str, str]] = {}
    for name, axes in zip(inputs, dynamic or (), strict=False):
        pairs = axes.items() if isinstance(axes, dict) else enumerate(axes or ())
        named[name] = {str(axis): dim.__name__ for axis, dim in pairs if hasattr(dim, "__name__")}
    return named


def _name_axes(graph: ir.Graph, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Rename the symbols of the export to the user's names."""
    renamed: dict[str, str] = {}
    for value in graph.inputs:
        for axis, label in axes.get(value.name or "", {}).items():
            symbol = value.shape[axis] if value.shape is not None else None
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                renamed[symbol.value] = label
    word = re.compile(r"\b(" + "|".join(map(re.escape, renamed)) + r")\b") if renamed else None
    for value in _values(graph) if word else ():
        for axis, dim in enumerate(value.shape if value.shape is not None else ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                value.shape[axis] = word.sub(lambda match: renamed[match[0]], dim.value)  # type: ignore[index,union-attr]


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _doubled(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument

"""`cpcompile opt`: graph passes on any ONNX file.

load -> inline functions, lift constants, infer shapes -> pass, pass, … -> compare with the original -> save
"""

from __future__ import annotations

import dataclasses
import time
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.types import Feeds, Progress
from cpcompile.files.arrays import load_ids
from cpcompile.files.onnx_file import Size, load_onnx, save_onnx, size_of
from cpcompile.files.whole_files import require_file_path
from cpcompile.passes.bind_context import BindContext
from cpcompile.passes.canonicalize_shapes import CanonicalizeShapes
from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.eliminate_dead_channels import Blocked, EliminateDeadChannels, Elimination
from cpcompile.passes.fold_constants import FoldConstants
from cpcompile.passes.fold_gates import FoldGates
from cpcompile.passes.group_query_heads import GroupQueryHeads
from cpcompile.passes.infer_shapes import Inference, InferShapes
from cpcompile.passes.opset import OpsetError
from cpcompile.passes.prune_experts import PruneExperts
from cpcompile.passes.remove_empty_layers import RemoveEmptyLayers
from cpcompile.passes.remove_whole_gathers import RemoveWholeGathers
from cpcompile.passes.rms_normalization import RmsNormalization
from cpcompile.passes.rotary_embedding import RotaryEmbedding
from cpcompile.passes.strip_metadata import StripMetadata
from cpcompile.passes.transpose_parameters import TransposeParameters
from cpcompile.passes.trim_vocabulary import TrimVocabulary, renumber_interface
from cpcompile.validation.output_comparison import Comparison, compare_files

PASSES: Mapping[str, type[ir.passes.InPlacePass]] = MappingProxyType(
    {
        "bind_context": BindContext,
        "trim_vocabulary": TrimVocabulary,
        "fold_constants": FoldConstants,
        "clean_up": CleanUp,
        "infer_shapes": InferShapes,
        "canonicalize_shapes": CanonicalizeShapes,
        "prune_experts": PruneExperts,
        "eliminate_dead_channels": EliminateDeadChannels,
        "remove_whole_gathers": RemoveWholeGathers,
        "group_query_heads": GroupQueryHeads,
        "rotary_embedding": RotaryEmbedding,
        "rms_normalization": RmsNormalization,
        "remove_empty_layers": RemoveEmptyLayers,
        "fold_gates": FoldGates,
        "transpose_parameters": TransposeParameters,
        "strip_metadata": StripMetadata,
    }
)
"""The passes that `--passes` accepts, in a useful order."""
DEFAULT = (
    *("fold_constants", "clean_up", "canonicalize_shapes", "clean_up", "eliminate_dead_channels"),
    *("transpose_parameters", "clean_up"),
)
"""The passes without `--passes`: those that keep the interface and the names of parameters."""


CheckLevel = Literal["none", "quick", "thorough"]
ROUNDS: Mapping[CheckLevel, int] = MappingProxyType({"none": 0, "quick": 1, "thorough": 5})
"""How many sets of random inputs the result is compared on."""


@dataclass(frozen=True)
class Step:
    """What one pass did."""

    name: str
    modified: bool
    seconds: float
    size: Size


@dataclass
class Skipped(ir.passes.PassResult):
    """Result of a pass that left the model unchanged because it needs a later opset."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """The result of `optimize_file`."""

    before: Size
    steps: Sequence[Step]
    bytes_written: int
    blocked: Sequence[Blocked]
    """Zero channels that had to stay, after the last elimination."""
    skipped: Sequence[str]
    """Why passes were skipped, one sentence each."""
    contradictions: Sequence[str]
    """What the file claims about its values and is not true, one text for each value."""
    comparison: Comparison | None
    """None if `check` is "none"."""


def optimize_file(
    source: Path,
    out: Path,
    passes: Sequence[str] = DEFAULT,
    *,
    check: CheckLevel = "quick",
    inputs: Sequence[Feeds] = (),
    dump: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Optimization:
    """Run `passes` (names, with settings as in `bind_context:context=2`) on the file `source` and write `out`.

    The outputs of both are compared on `inputs` and on random inputs: a few, or many if `check` is "thorough". A file
    that differs is not written. `dump` gets the graph after every pass.
    """
    require_file_path(out, ".onnx")
    chosen = [(text, parse_pass(text)) for text in passes]
    progress("load", 0, None)
    model = load_onnx(source)
    before = size_of(model)
    declared = _declared(model)
    contradictions = prepare(model, source)
    steps: list[Step] = []
    blocked: Sequence[Blocked] = ()
    skipped: list[str] = []
    for number, (text, each) in enumerate(chosen, 1):
        progress("passes", number - 1, len(chosen))
        started = time.perf_counter()
        result = apply_pass(each, model, source, text)
        steps.append(Step(text, bool(result.modified), time.perf_counter() - started, size_of(model)))
        if isinstance(result, Skipped):
            skipped.append(result.reason)
            if isinstance(each, EliminateDeadChannels):
                blocked = (Blocked("", 0, 0, "", "", result.reason),)
        elif isinstance(result, Elimination):
            blocked = result.blocked
        if dump is not None:
            save_onnx(model, dump / f"{number:02}-{text.partition(':')[0]}.onnx")
    progress("passes", len(chosen), len(chosen))
    if not any(isinstance(each, InferShapes) for _, each in chosen):
        _forget_types(model, declared)
    comparison: Comparison | None = None

    def accept(candidate: Path) -> bool:
        nonlocal comparison
        if check != "none":
            progress("check", 0, None)
            bound = {each.name: each.context for _, each in chosen if isinstance(each, BindContext)}
            original = _same_interface(source, [each for _, each in chosen], candidate.with_suffix(".original.onnx"))
            comparison = compare_files(original, candidate, inputs=inputs, bound=bound, rounds=ROUNDS[check])
        return comparison is None or comparison.verdict != "fail"

    written = save_onnx(model, out, accept)
    return Optimization(
        before=before,
        steps=steps,
        bytes_written=written,
        blocked=blocked,
        skipped=skipped,
        contradictions=contradictions,
        comparison=comparison,
    )


def _declared(model: ir.Model) -> set[str | None]:
    """Results of nodes that have a type."""
    return {out.name for node in model.graph.all_nodes() for out in node.outputs if out.type is not None}


def _forget_types(model: ir.Model, declared: Container[str | None]) -> None:
    """Leave out all types that the file does not need and did not have; they would make it larger."""
    for graph in model.graphs():
        for value in (*graph.initializers.values(), *(out for node in graph for out in node.outputs)):
            if value.name not in declared and not (value.is_graph_input() or value.is_graph_output()):
                value.type = value.shape = None


SETTINGS: Mapping[Any, tuple[str, Callable[[str], Any]]] = MappingProxyType(
    {
        int: ("a whole number", int),
        float: ("a number", float),
        str: ("text", str),
        tuple[int, ...]: ("an .npy file of token ids (one axis of whole numbers)", load_ids),
    }
)
"""Type of a setting -> its description in messages, and how to parse it."""


def parse_pass(text: str) -> ir.passes.InPlacePass:
    """The pass that `name` or `name:setting=value:…` asks for."""
    name, *settings = text.split(":")
    if name not in PASSES:
        raise UsageError(f"there is no pass {name!r}; there are {', '.join(PASSES)}")
    fields = settings_of(PASSES[name])
    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in fields:
            known = ", ".join(f"{name}:{field}=..." for field in fields) or "none"
            raise UsageError(f"the pass {name} has no setting {setting!r}; it has {known}")
        form, read = SETTINGS[fields[key]]
        try:
            values[key] = read(value)
        except ValueError as error:
            raise UsageError(f"{text}: {key} is {value!r} ({error}); give {form}") from error
    for field in dataclasses.fields(PASSES[name]):  # type: ignore[arg-type]
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise UsageError(f"the pass {name} needs a value: {name}:{field.name}=...")
    return PASSES[name](**values)


def settings_of(kind: type[ir.passes.InPlacePass]) -> dict[str, Any]:
    """The settings of a pass that fit on a command line, with their types."""
    return {name: hint for name, hint in typing.get_type_hints(kind).items() if hint in SETTINGS}


def prepare(model: ir.Model, source: Path) -> Sequence[str]:
    """Establish what passes may assume: no function calls, constants as initializers, shapes as far as possible.

    Returns what the file claims about its values and is not true.
    """
    if model.ir_version < 4:  # every initializer had to be an input, which does not mean that it is overridden
        inputs = [value for value in model.graph.inputs if not value.is_initializer()]
        model.graph.inputs.clear()
        model.graph.inputs.extend(inputs)
        model.ir_version = 4
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        if "ai.onnx" in graph.opset_imports:  # the long name of the standard domain, which nodes do not use
            graph.opset_imports[""] = graph.opset_imports.pop("ai.onnx")
    for value in (value for graph in model.graphs() for value in graph.initializers.values()):
        if (tensor := value.const_value) is not None and not value.is_graph_input():
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    for each in (InlinePass(), LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)):
        apply_pass(each, model, source, type(each).__name__)
    inference = apply_pass(InferShapes(), model, source, "infer_shapes")
    return inference.contradictions if isinstance(inference, Inference) else ()


def _same_interface(source: Path, passes: Sequence[ir.passes.InPlacePass], path: Path) -> Path:
    """The original with the interface of the result: itself, or a copy at `path` that takes the new token ids."""
    trims = [each for each in passes if isinstance(each, TrimVocabulary)]
    if not trims:
        return source
    model = load_onnx(source)
    for trim in trims:
        renumber_interface(model, trim)
    save_onnx(model, path)
    return path


def apply_pass(each: ir.passes.PassBase, model: ir.Model, source: Path, name: str) -> ir.passes.PassResult:
    """The result of a pass; `Skipped` if it needs a later opset than the model has and is optional."""
    try:
        return each(model)
    except OpsetError as error:
        if isinstance(each, TrimVocabulary):
            raise  # the model would not take the requested token ids
        return Skipped(model, False, str(error))
    except CpcompileError:
        raise
    except Exception as error:  # of any kind: the graph can be anything
        raise CpcompileError(
            f"{source}: the pass {name} failed with {type(error).__name__}: {error}; leave it out of --passes, "
            "and report the model"
        ) from error

"""Freeze: from the dynamic graph of all contexts to the static graph of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from cpcompile.passes.bind_context import BindContext
from cpcompile.passes.canonicalize_shapes import CanonicalizeShapes
from cpcompile.passes.clean_up import CleanUp
from cpcompile.passes.eliminate_dead_channels import Blocked, EliminateDeadChannels, Elimination, KeptChannels
from cpcompile.passes.fold_constants import FoldConstants
from cpcompile.passes.group_query_heads import GroupQueryHeads
from cpcompile.passes.prune_experts import PruneExperts, Pruning, Router
from cpcompile.passes.remove_whole_gathers import RemoveWholeGathers
from cpcompile.passes.strip_metadata import StripMetadata
from cpcompile.passes.transpose_parameters import TransposeParameters
from cpcompile.passes.trim_vocabulary import Trimming, TrimVocabulary, compose_kept


@dataclass(frozen=True)
class Frozen:
    """The graph of one context.

    `kept` says which channels of the stored parameters are left, per axis as it is stored now;
    `permutations` how the axes of a parameter were reordered; `routers` which experts are left.
    """

    model: ir.Model
    kept: KeptChannels
    permutations: dict[str, tuple[int, ...]]
    blocked: tuple[Blocked, ...]
    routers: tuple[Router, ...]


@dataclass(frozen=True)
class Prepared:
    """A dynamic graph with its constants folded; `parameters` are the initializers that it came with."""

    model: ir.Model
    parameters: frozenset[str]


def prepare(dynamic: ir.Model) -> Prepared:
    """Fold once what is the same in all contexts; `dynamic` stays as it is, tensors are shared."""
    prepared = Prepared(dynamic.clone(), frozenset(dynamic.graph.initializers))
    for each in (FoldConstants(), CleanUp(prepared.parameters), StripMetadata()):
        each(prepared.model)
    return prepared


def used_sizes(prepared: Prepared) -> dict[str, int]:
    """Elements of every parameter that some context may read; a row that no constant index picks is read by none."""
    model = prepared.model.clone()
    for each in (CanonicalizeShapes(), EliminateDeadChannels(CleanUp(prepared.parameters), cut_caches=True)):
        each(model)
    values = model.graph.initializers
    return {name: tensor.size if (tensor := v.const_value) is not None else 0 for name, v in values.items()}


def freeze(dynamic: ir.Model | Prepared, context: int, tokens: Sequence[int] | None = None) -> Frozen:
    """Bind `context` and remove what it does not use; `dynamic` stays as it is, tensors are shared.

    dynamic: if several contexts are to be frozen, `prepare` it: the result is the same, each takes less time.
    tokens: ids that the context's text needs, ascending; the others leave the vocabulary. None keeps them all.
    """
    if isinstance(dynamic, ir.Model):
        dynamic = Prepared(dynamic, frozenset(dynamic.graph.initializers))
    model, clean_up = dynamic.model.clone(), CleanUp(dynamic.parameters)
    for each in (BindContext(context), FoldConstants(), clean_up, CanonicalizeShapes(), clean_up):
        each(model)
    pruned = PruneExperts()(model)
    assert isinstance(pruned, Pruning)
    eliminated = EliminateDeadChannels(clean_up, cut_caches=True)(model)
    assert isinstance(eliminated, Elimination)
    RemoveWholeGathers()(model)
    GroupQueryHeads()(model)
    left = eliminated.kept
    if tokens is not None:
        trimmed = TrimVocabulary(tuple(tokens), clean_up=clean_up)(model)
        assert isinstance(trimmed, Trimming)
        left = compose_kept(left, trimmed.kept)
    transposed = TransposeParameters()(model)
    for finish in (clean_up, StripMetadata()):
        finish(model)
    permutations = dict(getattr(transposed, "permutations", {}))
    kept = {
        name: tuple(axes[axis] for axis in permutations.get(name, range(len(axes))))
        for name, axes in left.items()
        if name in model.graph.initializers
    }
    return Frozen(model, kept, permutations, (*eliminated.blocked, *pruned.blocked), pruned.routers)

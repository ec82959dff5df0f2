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


def freeze(dynamic: ir.Model, context: int, tokens: Sequence[int] | None = None) -> Frozen:
    """Bind `context` and remove what it does not use; `dynamic` stays as it is, tensors are shared.

    tokens: ids that the context's text needs, ascending; the others leave the vocabulary. None keeps them all.
    """
    model = dynamic.clone()
    clean_up = CleanUp(frozenset(dynamic.graph.initializers))
    for prepare in (BindContext(context), FoldConstants(), clean_up, CanonicalizeShapes(), clean_up):
        prepare(model)
    pruned = PruneExperts()(model)
    assert isinstance(pruned, Pruning)
    eliminated = EliminateDeadChannels(clean_up)(model)
    assert isinstance(eliminated, Elimination)
    RemoveWholeGathers()(model)
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

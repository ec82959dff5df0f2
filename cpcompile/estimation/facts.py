"""What a file says of a model: names, shapes and selections. Weights stay in the file.

A trained decoder tells exactly what each context keeps. A pretrained model would have to be traced for that; its shapes
say it nearly: a tensor with an axis as long as the FFN is cut like the FFN, one that begins with all experts like
experts, any other matrix that is no embedding like heads.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cpcompile.checkpoint import Checkpoint, load_checkpoint, read_checkpoint
from cpcompile.config import ModelConfig, TrainConfig
from cpcompile.errors import UsageError
from cpcompile.program import inspect_program
from cpcompile.selection import Selection, UnitKind
from cpcompile.source import FLOAT32_BYTES, PROGRAM_SUFFIX, choose_contexts, require_selection
from cpcompile.training.trainer import dense_path
from cpcompile.vocabulary import needed_tokens

TABLE = ".table"
"""How names of gates end."""


@dataclass(frozen=True, kw_only=True)
class ContextFacts:
    """One context: what its engine will hold."""

    kept_bytes: int
    head_bytes: int
    """Of a head that is the embedding too: an engine transposes it, and then has it twice."""
    classes: int
    """Logits per position."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A model on disk. Bytes are of float32 weights, gates included."""

    library: str | None
    """The architecture within transformers; None for one of our own or a program."""
    parameters: int
    bytes: int
    tensors: int
    dense_bytes: int | None
    """Of the dense baseline beside it; None if there is none."""
    classes: int
    """Logits per position with the whole vocabulary; 0 for a program."""
    sequence: int
    """Positions of a window of evaluation."""
    result_elements: int | None
    """Of the largest intermediate result of a program, at the size of its example; None for a language model."""
    vocabulary_bytes: int
    """Of all parameters with a row per token."""
    tokenizer_bytes: int
    contexts: Mapping[str, ContextFacts]
    union_bytes: int
    """What any of the contexts keeps."""


def read_facts(path: Path, *, contexts: Sequence[str] | None = None, coverage: float | None = None) -> Facts:
    """Facts of `path` for a build of `contexts` (None: all) with that part of their vocabularies (None: whole).

    UsageError says what is wrong with the file.
    """
    if path.suffix == PROGRAM_SUFFIX:
        return _program_facts(path, contexts)
    checkpoint = read_checkpoint(path, mapped=True)
    selection = require_selection(path, checkpoint)
    chosen = choose_contexts(path, checkpoint.contexts, contexts)
    if isinstance(checkpoint.config, ModelConfig):
        checkpoint = load_checkpoint(path, mapped=True)  # made around mapped weights, the model costs nothing
    try:
        return _checkpoint_facts(path, checkpoint, selection, chosen, coverage)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UsageError(f"{path}: the checkpoint is incomplete or inconsistent: {error}; train it again") from error


def _checkpoint_facts(
    path: Path, checkpoint: Checkpoint, selection: Selection, chosen: Sequence[str], coverage: float | None
) -> Facts:
    state, vocabulary = checkpoint.state, checkpoint.config.vocabulary
    tables = [tensor for name, tensor in state.items() if _has_rows(name, tensor, vocabulary)]
    row_bytes = sum(tensor.numel() // vocabulary for tensor in tables) * FLOAT32_BYTES
    needed = _needed(path, checkpoint, chosen, coverage)
    found = {}
    for context in chosen:
        tokens = len(needed[context]) if needed else vocabulary
        kept = _kept_bytes(checkpoint, selection.row(context)) - (vocabulary - tokens) * row_bytes
        tied = tokens * row_bytes if len(tables) == 1 else 0
        found[context] = ContextFacts(kept_bytes=kept, head_bytes=tied, classes=tokens)
    union = _kept_bytes(checkpoint, {kind: _any(selection, kind, chosen) for kind in selection.kept})
    if needed:
        union -= (vocabulary - len(np.unique(np.concatenate(list(needed.values()))))) * row_bytes
    settings = checkpoint.training.get("settings", {})
    return Facts(
        library=None if isinstance(checkpoint.config, ModelConfig) else str(checkpoint.config.settings["model_type"]),
        parameters=sum(tensor.numel() for name, tensor in state.items() if not name.endswith(TABLE)),
        bytes=_bytes(state),
        tensors=len(state),
        dense_bytes=_bytes(read_checkpoint(dense, mapped=True).state) if (dense := dense_path(path)).exists() else None,
        classes=vocabulary,
        sequence=int(settings.get("sequence", TrainConfig.sequence)),
        result_elements=None,
        vocabulary_bytes=vocabulary * row_bytes,
        tokenizer_bytes=len(checkpoint.tokenizer.encode()),
        contexts=found,
        union_bytes=union,
    )


def _needed(
    path: Path, checkpoint: Checkpoint, chosen: Sequence[str], coverage: float | None
) -> dict[str, npt.NDArray[np.int64]]:
    """The token ids that each context keeps; empty where vocabularies stay whole."""
    if coverage is None:
        return {}
    if missing := [context for context in chosen if context not in checkpoint.token_counts]:
        raise UsageError(f"{path}: has no token counts of {', '.join(missing)}; train it again")
    counts = checkpoint.token_counts
    return {context: needed_tokens(checkpoint.tokenizer, counts[context], coverage=coverage) for context in chosen}


def _any(selection: Selection, kind: UnitKind, chosen: Sequence[str]) -> npt.NDArray[np.bool_]:
    """The units of `kind` that any of the contexts keeps, (layers, units)."""
    rows = [selection.contexts.index(context) for context in chosen]
    return np.asarray(selection.kept[kind][rows].any(axis=0))


def _kept_bytes(checkpoint: Checkpoint, kept: Mapping[UnitKind, npt.NDArray[np.bool_]]) -> int:
    """Of the parameters that are left where `kept` (layers, units) is; the vocabulary whole."""
    if isinstance(checkpoint.config, ModelConfig):
        one = Selection(("one",), {kind: table[None] for kind, table in kept.items()})
        return sum(checkpoint.model.kept_sizes(one, "one").values()) * FLOAT32_BYTES
    parts = {kind: float(table.mean()) for kind, table in kept.items()}
    channels = kept[UnitKind.FFN].shape[1] * checkpoint.config.align if UnitKind.FFN in kept else None
    experts = kept[UnitKind.EXPERT].shape[1] if UnitKind.EXPERT in kept else None
    total = 0.0
    for name, tensor in checkpoint.state.items():
        if name.endswith(TABLE):
            continue
        part = 1.0
        if _has_rows(name, tensor, checkpoint.config.vocabulary):
            pass
        elif tensor.ndim > 2 and tensor.shape[0] == experts:
            part = parts[UnitKind.EXPERT]
        elif channels in tensor.shape:
            part = parts[UnitKind.FFN]
        elif tensor.ndim > 1:
            part = parts.get(UnitKind.HEAD, 1.0)
        total += part * tensor.numel()
    return round(total) * FLOAT32_BYTES


def _has_rows(name: str, tensor: Tensor, vocabulary: int) -> bool:
    return not name.endswith(TABLE) and tensor.ndim == 2 and tensor.shape[0] == vocabulary


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values()) * FLOAT32_BYTES


def _program_facts(path: Path, contexts: Sequence[str] | None) -> Facts:
    record, _ = inspect_program(path)
    try:
        chosen = choose_contexts(path, record["contexts"], contexts)
        kept = {c: sum(int(size) for size in record["kept"][c].values()) * FLOAT32_BYTES for c in chosen}
        with zipfile.ZipFile(path) as archive:
            weights = [i.file_size for i in archive.infolist() if "/weights/" in i.filename and _is_data(i.filename)]
            graphs = [json.loads(archive.read(n)) for n in archive.namelist() if "/models/" in n and not _is_data(n)]
        return Facts(
            library=None,
            parameters=sum(weights) // FLOAT32_BYTES,
            bytes=sum(weights),
            tensors=len(weights),
            dense_bytes=None,
            classes=0,
            sequence=1,
            result_elements=max((_largest_result(graph) for graph in graphs), default=0),
            vocabulary_bytes=0,
            tokenizer_bytes=0,
            contexts={c: ContextFacts(kept_bytes=size, head_bytes=0, classes=0) for c, size in kept.items()},
            union_bytes=min(sum(weights), sum(kept.values())),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UsageError(f"{path}: its record is garbled ({error}); save it again") from error


def _is_data(name: str) -> bool:
    return not name.endswith(".json")


def _largest_result(graph: Mapping[str, Any]) -> int:
    """Elements of the largest tensor in a serialised torch.export graph; symbols stand for their example's size."""
    values = graph["graph_module"]["graph"]["tensor_values"].values()
    return max((math.prod(_length(size) for size in value["sizes"]) for value in values), default=0)


def _length(size: Mapping[str, Any]) -> int:
    return int(size["as_int"] if "as_int" in size else size["as_expr"]["hint"]["as_int"])

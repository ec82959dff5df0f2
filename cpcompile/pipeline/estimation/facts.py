"""Facts about a model from its file: names, shapes and selections. The weights are not read.

For our own decoder it is known exactly what each context keeps, and a program records it. A pretrained model would
have to be traced for that; its shapes give an approximation: a tensor whose first axis has the length of all experts is
cut like experts, one with an axis as long as the FFN like the FFN, any other matrix except embeddings like heads.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cpcompile.core.config import ModelConfig, TrainConfig
from cpcompile.core.errors import UsageError
from cpcompile.core.paths import dense_path
from cpcompile.core.selection import BoolArray, Selection, UnitKind
from cpcompile.frontend.checkpoint import Checkpoint, load_checkpoint, read_checkpoint
from cpcompile.frontend.program_archive import inspect_program
from cpcompile.frontend.source import FLOAT32_BYTES, NO_TOKENIZER, PROGRAM_SUFFIX, choose_contexts, require_selection
from cpcompile.text.vocabulary import needed_tokens

TABLE = ".table"
"""Suffix of gate names in a checkpoint; gates are found by name because no pretrained model is created here."""
MOST = 2**63 - 1
"""Largest number of elements of a tensor in torch."""


@dataclass(frozen=True, kw_only=True)
class ContextFacts:
    """What the engine of one context will hold."""

    kept_bytes: int
    head_bytes: int
    """Bytes of a head tied to the embedding, which an engine transposes and so holds twice; 0 for any other head."""
    classes: int
    """Logits per position; 0 for a program."""

    @property
    def engine_bytes(self) -> int:
        """Weights in memory once the engine is loaded."""
        return self.kept_bytes + self.head_bytes


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A model on disk. Bytes are of float32 weights."""

    model_type: str | None
    """The name of the architecture in transformers; None for our own decoder or a program."""
    bytes: int
    """Gates included."""
    tensors: int
    dense_bytes: int | None
    """Bytes of the dense baseline next to it; None if there is none."""
    classes: int
    """Logits per position with the whole vocabulary; 0 for a program."""
    sequence: int
    """Positions of a window of evaluation."""
    result_elements: int | None
    """Elements of the largest result within a program, for the shapes of its example; None for a language model."""
    vocabulary_bytes: int
    """Bytes of all parameters with a row per token."""
    tokenizer_bytes: int
    text_tokens: int = 0
    """Held-out tokens of a context, on which quality is measured."""
    contexts: Mapping[str, ContextFacts]
    union_bytes: int
    """Bytes that any of the contexts keeps; an upper bound for a program."""

    @property
    def parameters(self) -> int:
        """Elements of the weights."""
        return self.bytes // FLOAT32_BYTES


def read_facts(path: Path, *, contexts: Sequence[str] | None = None, coverage: float | None = None) -> Facts:
    """Facts of `path` for a build of `contexts` (None: all) whose vocabularies cover `coverage` (None: are whole).

    UsageError says what is wrong with the file.
    """
    if path.suffix == PROGRAM_SUFFIX:
        if coverage is not None:
            raise UsageError(NO_TOKENIZER.format(path))
        return _program_facts(path, contexts)
    checkpoint = read_checkpoint(path, mapped=True)
    selection = require_selection(path, checkpoint)
    if isinstance(checkpoint.config, ModelConfig):
        checkpoint = load_checkpoint(path, mapped=True)  # made around mapped weights, the model costs nothing
    with _sentences(path, "train it again"):
        chosen = choose_contexts(path, checkpoint.contexts, contexts)
        return _checkpoint_facts(path, checkpoint, selection, chosen, coverage)


@contextmanager
def _sentences(path: Path, remedy: str) -> Iterator[None]:
    """Turn errors of malformed content into a UsageError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UsageError(f"{path}: is incomplete or inconsistent ({error}); {remedy}") from error


def _checkpoint_facts(
    path: Path, checkpoint: Checkpoint, selection: Selection, chosen: Sequence[str], coverage: float | None
) -> Facts:
    state, vocabulary = checkpoint.state, checkpoint.config.vocabulary
    tables = [tensor for name, tensor in state.items() if _has_rows(name, tensor, vocabulary)]
    if not tables:
        raise ValueError(f"no parameter has a row for each of {vocabulary} tokens")
    row_bytes = sum(tensor.numel() // vocabulary for tensor in tables) * FLOAT32_BYTES
    needed = _needed(path, checkpoint, chosen, coverage)
    found = {}
    for context in chosen:
        tokens = len(needed[context]) if needed else vocabulary
        kept = _kept_bytes(checkpoint, selection.row(context)) - (vocabulary - tokens) * row_bytes
        tied = tokens * row_bytes if len(tables) == 1 else 0
        found[context] = ContextFacts(kept_bytes=kept, head_bytes=tied, classes=tokens)
    rows = [selection.contexts.index(context) for context in chosen]
    union = _kept_bytes(
        checkpoint, {kind: np.asarray(table[rows].any(axis=0)) for kind, table in selection.kept.items()}
    )
    if needed:
        union -= (vocabulary - len(np.unique(np.concatenate(list(needed.values()))))) * row_bytes
    settings = checkpoint.training.get("settings", {})
    return Facts(
        model_type=None if isinstance(checkpoint.config, ModelConfig) else checkpoint.config.settings["model_type"],
        bytes=_bytes(state),
        tensors=len(state),
        dense_bytes=_bytes(read_checkpoint(dense, mapped=True).state) if (dense := dense_path(path)).exists() else None,
        classes=vocabulary,
        sequence=int(settings.get("sequence", TrainConfig.sequence)),
        result_elements=None,
        vocabulary_bytes=vocabulary * row_bytes,
        tokenizer_bytes=len(checkpoint.tokenizer.encode()),
        text_tokens=max((len(checkpoint.held_out.get(context, ())) for context in chosen), default=0),
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


def _kept_bytes(checkpoint: Checkpoint, kept: Mapping[UnitKind, BoolArray]) -> int:
    """Bytes of the parameters that remain with the units `kept` (layers, units); the vocabulary is whole."""
    if isinstance(checkpoint.config, ModelConfig):
        one = Selection(("one",), {kind: table[None] for kind, table in kept.items()})
        return sum(checkpoint.model.kept_sizes(one, "one").values()) * FLOAT32_BYTES
    parts = {kind: float(table.mean()) for kind, table in kept.items()}
    units = {kind: table.shape[1] for kind, table in kept.items()}
    channels = units.get(UnitKind.FFN, 0) * checkpoint.config.align

    def part(name: str, tensor: Tensor) -> float:
        if _has_rows(name, tensor, checkpoint.config.vocabulary):
            return 1.0
        if tensor.ndim > 2 and tensor.shape[0] == units.get(UnitKind.EXPERT):
            return parts[UnitKind.EXPERT]
        if channels in tensor.shape:
            return parts[UnitKind.FFN]
        return parts.get(UnitKind.HEAD, 1.0) if tensor.ndim > 1 else 1.0

    weights = ((name, tensor) for name, tensor in checkpoint.state.items() if not name.endswith(TABLE))
    return round(sum(part(name, tensor) * tensor.numel() for name, tensor in weights)) * FLOAT32_BYTES


def _has_rows(name: str, tensor: Tensor, vocabulary: int) -> bool:
    return not name.endswith(TABLE) and tensor.ndim == 2 and tensor.shape[0] == vocabulary


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values()) * FLOAT32_BYTES


def _program_facts(path: Path, contexts: Sequence[str] | None) -> Facts:
    record, _ = inspect_program(path)
    with _sentences(path, "save it again"), zipfile.ZipFile(path) as archive:
        chosen = choose_contexts(path, record["contexts"], contexts)
        if not chosen:
            raise ValueError("there are no contexts")
        kept = {context: sum(map(int, record["kept"][context].values())) * FLOAT32_BYTES for context in chosen}
        weights, results = [], []
        for entry in archive.infolist():
            described = entry.filename.endswith(".json")
            if "/weights/" in entry.filename and not described:
                weights.append(entry.file_size)
            elif "/models/" in entry.filename and described:
                results.append(_largest_result(json.loads(archive.read(entry))["graph_module"]["graph"]))
        total = sum(weights)
        if not all(0 <= size <= total for size in kept.values()):
            raise ValueError(f"contexts keep {kept} bytes of {total}")
    return Facts(
        model_type=None,
        bytes=total,
        tensors=len(weights),
        dense_bytes=None,
        classes=0,
        sequence=1,
        result_elements=max(results, default=0),
        vocabulary_bytes=0,
        tokenizer_bytes=0,
        contexts={c: ContextFacts(kept_bytes=size, head_bytes=0, classes=0) for c, size in kept.items()},
        union_bytes=min(total, sum(kept.values())),
    )


def _largest_result(graph: Mapping[str, Any]) -> int:
    """Elements of the largest tensor that a serialised torch.export graph computes.

    Symbols have the size that they have in the example; one that depends on data has none, and counts as 1.
    """
    given = {entry["as_tensor"]["name"] for entry in graph["inputs"] if "as_tensor" in entry}
    computed = {name: value["sizes"] for name, value in graph["tensor_values"].items() if name not in given}
    largest = max((math.prod(map(_length, sizes)) for sizes in computed.values()), default=0)
    if largest > MOST:
        raise ValueError("a result is larger than any tensor can be")
    return largest


def _length(size: Mapping[str, Any]) -> int:
    length = size["as_int"] if "as_int" in size else (size["as_expr"]["hint"] or {"as_int": 1})["as_int"]
    if type(length) is not int or length < 0:
        raise ValueError(f"a result has an axis of {str(length)[:40]}")
    return length

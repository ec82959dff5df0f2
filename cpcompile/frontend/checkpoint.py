"""`model.pt`: plain tensors in plain containers, loaded with `weights_only=True` and nothing else.

format, version     what the file is
architecture        name and config of the model
state               parameter name -> tensor
selection           which units each context keeps (None in a dense checkpoint)
contexts, tokenizer, training, held_out, token_counts
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpcompile.core.config import ModelConfig, PretrainedConfig, TrainConfig, require_context_name
from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.core.overrides import override
from cpcompile.core.selection import Selection
from cpcompile.files.pointers import require_fetched
from cpcompile.files.whole_files import require_regular_file, whole_file
from cpcompile.models.decoder import Decoder
from cpcompile.models.language_model import LanguageModel
from cpcompile.models.shared_state import share_state, without_weights

FORMAT = "cpcompile-checkpoint"
VERSION = 1
ARCHITECTURES: Mapping[str, type[ModelConfig | PretrainedConfig]] = {
    "decoder": ModelConfig,
    "hugging_face": PretrainedConfig,
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained model with everything that is needed to build and validate it elsewhere."""

    config: ModelConfig | PretrainedConfig
    state: Mapping[str, Tensor]
    contexts: tuple[str, ...]
    tokenizer: str
    """The text of tokenizer.json."""
    selection: Selection | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    """Run, settings, seed, data digests, versions, metrics, controls: plain containers."""
    held_out: Mapping[str, npt.NDArray[np.int32]] = field(default_factory=dict)
    """Held-out token ids per context, 1-D; empty where they were left out."""
    token_counts: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    """How often each token occurs in the training text of a context, (vocabulary,)."""

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The eager model in eval mode, made once and only read: gated if there is a selection, else dense.

        Its parameters are the tensors of `state`, not copies.
        """
        contexts = len(self.contexts) if self.selection is not None else 0
        return make_model(self.config, contexts=contexts, state=self.state).eval()


def architecture(config: ModelConfig | PretrainedConfig) -> str:
    """The name of the architecture that `config` shapes."""
    return next(name for name, kind in ARCHITECTURES.items() if isinstance(config, kind))


def make_model(
    config: ModelConfig | PretrainedConfig, *, contexts: int = 0, state: Mapping[str, Tensor] | None = None
) -> LanguageModel:
    """A model of that architecture, with a row of gates per context: untrained, or around the tensors of `state`."""
    if isinstance(config, ModelConfig):
        if state is None:
            return Decoder(config, contexts=contexts)
        with without_weights():
            decoder = Decoder(config, contexts=contexts)
        share_state(decoder, state)
        return decoder
    # Imported late: the memory of our own models is measured, and should not include what only pretrained ones need.
    from cpcompile.partitioning.pretrained import PretrainedDecoder

    return PretrainedDecoder(config, contexts=contexts, state=state)


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write `checkpoint` to `path` in one step: a reader sees the old file or the new one."""
    save_atomically(
        {
            "format": FORMAT,
            "version": VERSION,
            "architecture": {
                "name": architecture(checkpoint.config),
                "config": dataclasses.asdict(checkpoint.config),
            },
            "state": {name: tensor.detach().clone() for name, tensor in checkpoint.state.items()},
            "selection": checkpoint.selection.to_plain() if checkpoint.selection else None,
            "contexts": list(checkpoint.contexts),
            "tokenizer": checkpoint.tokenizer,
            # Through JSON: other packages return subclasses of str and float, which would not load again.
            "training": json.loads(json.dumps(dict(checkpoint.training))),
            "held_out": {
                context: torch.from_numpy(np.array(ids, dtype=np.int32)) for context, ids in checkpoint.held_out.items()
            },
            "token_counts": {c: torch.from_numpy(np.asarray(n)) for c, n in checkpoint.token_counts.items()},
        },
        path,
    )


def load_checkpoint(path: Path, *, mapped: bool = False) -> Checkpoint:
    """Read `path`; UsageError says what is wrong with it and what to do.

    mapped: the weights stay in the file, whose pages take memory only as they are read; enough to inspect it.
    """
    checkpoint = read_checkpoint(path, mapped=mapped)
    with _sentences(path):
        _require_fitting_model(checkpoint)
    return checkpoint


def read_checkpoint(path: Path, *, mapped: bool = False) -> Checkpoint:
    """Like `load_checkpoint`, but without making the model to check that it fits."""
    plain = load_plain(path, mapped=mapped)
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise UsageError(
            f"{path}: is a torch file but not a cpcompile checkpoint; `cpcompile train --out {path.name}` writes one"
        )
    if plain.get("version") != VERSION:
        raise UsageError(
            f"{path}: checkpoint version {plain.get('version')!r}, this cpcompile reads {VERSION}; "
            "train it again or use the cpcompile that wrote it"
        )
    with _sentences(path):
        name, settings = plain["architecture"]["name"], plain["architecture"]["config"]
        if name not in ARCHITECTURES:
            raise UsageError(f"unknown architecture {name!r}; there are {', '.join(ARCHITECTURES)}")
        checkpoint = Checkpoint(
            config=ARCHITECTURES[name](**settings),
            state=plain["state"],
            selection=Selection.from_plain(plain["selection"]) if plain["selection"] else None,
            contexts=tuple(plain["contexts"]),
            tokenizer=plain["tokenizer"],
            training=plain["training"],
            held_out={context: ids.numpy() for context, ids in plain["held_out"].items()},
            token_counts={context: counts.numpy() for context, counts in plain.get("token_counts", {}).items()},
        )
        _require_consistent(checkpoint)
        return checkpoint


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turn errors in the content of `path` into a UsageError that names it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{path}: the checkpoint is incomplete or inconsistent: {error}; train it again") from error


def _require_consistent(checkpoint: Checkpoint) -> None:
    """ValueError or UsageError unless everything has the forms and ranges that training gives it."""
    contexts, config, training = checkpoint.contexts, checkpoint.config, checkpoint.training
    for context in contexts:
        require_context_name(context, "contexts")
    if not contexts or len(set(contexts)) < len(contexts):
        raise ValueError(f"contexts {list(contexts)} are none or not distinct")
    if checkpoint.selection is not None and checkpoint.selection.contexts != contexts:
        raise ValueError(f"the selection is for {list(checkpoint.selection.contexts)}, the model for {list(contexts)}")
    for context, ids in checkpoint.held_out.items():
        if context not in contexts or ids.ndim != 1 or ids.dtype != np.int32:
            raise ValueError(f"held_out of {context!r} is no list of token ids of one of the contexts")
        if ids.size and not 0 <= ids.min() <= ids.max() < config.vocabulary:
            raise ValueError(f"held_out of {context!r} has ids outside of the vocabulary of {config.vocabulary}")
    for context, counts in checkpoint.token_counts.items():
        if context not in contexts or counts.shape != (config.vocabulary,) or counts.dtype != np.int64:
            raise ValueError(f"token_counts of {context!r} are not {config.vocabulary} integers of one of the contexts")
    if not isinstance(checkpoint.tokenizer, str):
        raise ValueError("the tokenizer is no text")
    override(TrainConfig(), training.get("settings", {}), where="training.settings")


def _require_fitting_model(checkpoint: Checkpoint) -> None:
    """ValueError unless the settings and parameters make a model that has the selected units."""
    config = checkpoint.config
    if isinstance(config, ModelConfig) and config.layers > len(checkpoint.state):
        raise ValueError(f"{config.layers} layers and {len(checkpoint.state)} parameters")
    model = checkpoint.model
    if (selection := checkpoint.selection) is not None:
        units = {units.kind: (len(checkpoint.contexts), units.layers, units.count) for units in model.units()}
        shapes = {kind: table.shape for kind, table in selection.kept.items()}
        if any(shape != units.get(kind) for kind, shape in shapes.items()):
            raise ValueError(f"the selection has {shapes}, the model {units}")


def save_atomically(plain: object, path: Path) -> None:
    """torch.save; a reader sees the old file or the new one."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(plain, file)
        except RuntimeError as error:  # torch's writer reports a write that failed as a position it did not expect
            file.flush()
            raise CpcompileError(
                f"{path}: cannot be written, the disk seems full; free space, or write to another folder"
            ) from error


def load_plain(path: Path, *, mapped: bool = False) -> Any:
    """`torch.load(weights_only=True)` with errors that help."""
    require_regular_file(path, "a checkpoint is a file such as model.pt")
    require_fetched(path)
    try:
        _require_torch_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles from other writers, which are refused below
            # Only archives can be mapped; for anything else torch would report only that, and not what is wrong.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such file; `cpcompile train` writes one") from error
    except PermissionError as error:
        raise UsageError(f"{path}: cannot be read (permission denied)") from error
    except pickle.UnpicklingError as error:
        if _checksums_hold(path) and ("weights_only" in str(error) or "Unsupported" in str(error)):
            raise UsageError(
                f"{path}: refused, because loading it would run code that the file brings along; "
                "cpcompile loads plain tensors only. Save the state dict of the model instead "
                "(torch.save(model.state_dict(), …)), or train it with `cpcompile train`"
            ) from error
        raise UsageError(f"{path}: is damaged; copy or train it again") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise UsageError(f"{path}: is not a torch file, or is truncated or damaged; copy or train it again") from error


def _require_torch_file(path: Path) -> None:
    """UsageError unless `path` begins as what torch.save writes, an archive or a pickle, and is whole."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PK\x03\x04":
        if not zipfile.is_zipfile(path):
            raise UsageError(f"{path}: is truncated; copy or train it again")
    elif not head.startswith(pickle.PROTO):
        what = "is not a torch file" if head else "is empty"
        raise UsageError(f"{path}: {what}; give a checkpoint, such as the model.pt that `cpcompile train` writes")


def _checksums_hold(path: Path) -> bool:
    """Whether the pickle in an archive is what was written; True for a plain pickle, which has no checksum."""
    if not zipfile.is_zipfile(path):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    archive.read(name)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, OSError, RuntimeError):
        return False
    return True

"""The dense baseline as a teacher: its largest log-probabilities per token, computed once and kept on disk.

Batches are a pure function of the step, so every branch that distils sees the same tokens and
reads what the first one computed. Missing targets are computed on demand, which makes the cache
resumable: a step counts as present only after its values have been written.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpcompile.core.errors import CpcompileError
from cpcompile.models.language_model import LanguageModel

Targets = tuple[Tensor, Tensor]
"""Token ids and log-probabilities of the best guesses, both (tokens, top)."""


class Teacher:
    """Targets for `steps` x `contexts` batches of `tokens` tokens, `top` log-probabilities each."""

    def __init__(
        self, model: LanguageModel, folder: Path, *, steps: range, contexts: int, tokens: int, top: int
    ) -> None:
        self.model = model
        self.steps = steps
        top = min(top, model.config.vocabulary - 1)
        shape = (len(steps), contexts, tokens, top)
        folder.mkdir(parents=True, exist_ok=True)
        self._ids = _open(folder / "ids", np.int32, shape)
        self._values = _open(folder / "log_probabilities", np.float16, shape)
        self._there = _open(folder / "there", np.uint8, shape[:2])

    def targets(self, step: int, context: int, input_ids: Tensor) -> Targets:
        """The teacher's best guesses."""
        at = (step - self.steps.start, context)
        if not self._there[at]:
            with torch.no_grad():
                best = [
                    self.model(piece).flatten(0, 1).log_softmax(-1).topk(self._ids.shape[-1], dim=-1)
                    for piece in self.model.pieces(input_ids)
                ]
            self._ids[at] = torch.cat([each.indices for each in best]).numpy()
            self._values[at] = torch.cat([each.values for each in best]).numpy()
            self._there[at] = 1
        # Always read back, so that a resumed run sees the same rounding as the first.
        return torch.from_numpy(self._ids[at].astype(np.int64)), torch.from_numpy(self._values[at].astype(np.float32))


def divergence(log_probabilities: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Mean KL(teacher || student) over tokens; all classes outside the teacher's best form one class.

    log_probabilities (tokens, vocabulary) of the student; ids, values (tokens, top) of the teacher.
    By the log-sum inequality this is a lower bound of the full divergence.
    """
    student = log_probabilities.gather(-1, ids)
    teacher = values.exp()
    tail = 1e-6
    teacher_rest = (1 - teacher.sum(-1)).clamp_min(tail)
    student_rest = (1 - student.exp().sum(-1)).clamp_min(tail)
    top = (teacher * (values - student)).sum(-1)
    return (top + teacher_rest * (teacher_rest.log() - student_rest.log())).mean()


def _open(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A memory-mapped array in `path`: the existing one, or a new one of zeros."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not path.exists() or path.stat().st_size != size:
        with path.open("wb") as file:
            try:
                # Reserved now: writing to a mapped page when the disk is full would kill the process.
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise CpcompileError(
                    f"{path}: {size / 1e6:,.0f} MB for the teacher's targets cannot be reserved ({error.strerror}); "
                    "free space, or lower train.teacher_top"
                ) from error
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)

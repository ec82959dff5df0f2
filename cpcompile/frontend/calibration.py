"""`model.calibration.pt`: what the parameters of `model.pt` are rounded to, loaded with `weights_only=True`.

format, version     what the file is
model               the digest of model.pt
rounded             scheme -> parameter -> its numbers, their scales, and perhaps factors of its inputs, see
                    `cpcompile.core.rounding.Rounded`
digest              of all of them
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpcompile.core.errors import UsageError
from cpcompile.core.rounding import SCHEMES, Calibration, Rounded, Scheme
from cpcompile.files.whole_files import file_digest, require_file_path
from cpcompile.frontend.checkpoint import load_plain, save_atomically
from cpcompile.models.language_model import LanguageModel

FORMAT = "cpcompile-calibration"
VERSION = 2
AGAIN = "calibrate again, or take it away to round to the nearest numbers"


def save_calibration(calibration: Calibration, model: Path, path: Path) -> None:
    """Write the calibration of the checkpoint `model` to `path` in one step."""
    rounded: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name, schemes in calibration.items():
        for scheme, arrays in schemes.items():
            there = {part: each for part, each in arrays._asdict().items() if each is not None}
            rounded.setdefault(scheme, {})[name] = {part: torch.from_numpy(each) for part, each in there.items()}
    save_atomically(
        {
            "format": FORMAT,
            "version": VERSION,
            "model": file_digest(model),
            "rounded": rounded,
            "digest": _digest(calibration),
        },
        path,
    )


def require_free(path: Path) -> Path:
    """`path`; UsageError unless a calibration may be written there: in place of nothing, or of an earlier one."""
    require_file_path(path)
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"{path}: cannot be written (permission denied); copy the model to a folder of your own")
    if path.exists():
        try:
            _load_plain(path)
        except UsageError as error:
            raise UsageError(f"{path}: is no calibration, and stays as it is; move it away first") from error
    return path


def require_precisions(calibration: Calibration, precisions: Sequence[str], path: Path) -> None:
    """UsageError if `calibration`, which was read from `path`, leaves out one of the `precisions`."""
    for each in precisions:
        for known in calibration.values():
            inputs = next(iter(known.values())).numbers[..., 0].size
            if each not in known and SCHEMES[each].fits(inputs):
                raise UsageError(
                    f"{path}: was made without {each}; calibrate again for all precisions that you build, or take it "
                    "away to round to the nearest numbers"
                )


def load_calibration(path: Path, model: Path, eager: LanguageModel) -> Calibration:
    """Read `path`, the calibration of the checkpoint `model`, which makes `eager`; UsageError if it is not."""
    plain = _load_plain(path)
    if plain.get("version") != VERSION:
        raise UsageError(f"{path}: version {plain.get('version')!r}, this cpcompile reads {VERSION}; {AGAIN}")
    if plain.get("model") != file_digest(model):
        raise UsageError(f"{path}: was made for another model, or for an earlier form of {model}; {AGAIN}")
    shapes = {name: tuple(each.shape) for name, each in eager.named_parameters()}
    found: dict[str, dict[str, Rounded]] = {}
    try:
        for scheme, parameters in plain["rounded"].items():
            for name, tensors in parameters.items():
                rounded = Rounded(**{part: tensor.numpy() for part, tensor in tensors.items()})
                _require_fitting(SCHEMES[scheme], shapes[name], rounded)
                found.setdefault(name, {})[scheme] = rounded
    except ValueError as error:
        raise UsageError(f"{path}: {error}; {AGAIN}") from error
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{path}: is incomplete or inconsistent; {AGAIN}") from error
    if plain.get("digest") != _digest(found):
        raise UsageError(f"{path}: is damaged; {AGAIN}")
    return found


def _load_plain(path: Path) -> dict[str, Any]:
    try:
        plain = load_plain(path, mapped=True)
    except UsageError as error:
        raise UsageError(f"{path}: cannot be read, or is no calibration; {AGAIN}") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise UsageError(f"{path}: is no calibration; {AGAIN}")
    return plain


def _digest(calibration: Calibration) -> str:
    digest = hashlib.sha256()
    for name in sorted(calibration):
        for scheme, arrays in sorted(calibration[name].items()):
            digest.update(f"{name} {scheme}\n".encode())
            for each in arrays:
                digest.update(b"" if each is None else each.tobytes())
    return digest.hexdigest()


def _require_fitting(scheme: Scheme, shape: tuple[int, ...], rounded: Rounded) -> None:
    """ValueError unless `rounded` is what `scheme` makes of a parameter with that shape."""
    numbers, scales, factors = rounded
    blocks, block, outputs = numbers.shape
    half = 2 ** (scheme.bits - 1)
    fits = (blocks * block, outputs) in (shape, shape[::-1]) and block == (scheme.block or blocks * block)
    if not fits or scales.shape != (blocks, 1, outputs) or numbers.dtype != "int8" or scales.dtype != "float32":
        raise ValueError(f"{scheme.name} does not make {numbers.dtype} {numbers.shape} of a parameter {shape}")
    if numbers.min() < -half or numbers.max() >= half or not np.isfinite(scales).all():
        raise ValueError(f"numbers or scales are out of the range of {scheme.name}")
    if factors is not None:
        if not scheme.smooths or factors.shape != (blocks * block,) or factors.dtype != "float32":
            raise ValueError(f"{scheme.name} does not take factors {factors.dtype} {factors.shape}")
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise ValueError("factors are not all positive numbers")

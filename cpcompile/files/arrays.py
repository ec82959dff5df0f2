"""Arrays that a user gives: the inputs of a model in an .npz file, token ids in an .npy file."""

from __future__ import annotations

import zipfile
from collections.abc import Container
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cpcompile.core.errors import UsageError
from cpcompile.core.types import Array, Feeds
from cpcompile.files.onnx_file import load_onnx
from cpcompile.files.pointers import require_fetched


def load_inputs(path: Path, model: Path, *, bound: Container[str | None] = ()) -> Feeds:
    """The arrays of an .npz file by name, which are inputs of the ONNX file `model`; never a pickle.

    bound: inputs that may be left out. Raises UsageError for names, types and shapes that the model does not take.
    """
    feeds = _read(path)
    inputs = {value.name: value for value in load_onnx(model).graph.inputs}
    takes = ", ".join(_described(value) for value in inputs.values() if value.name not in bound)
    if unknown := [name for name in feeds if name not in inputs]:
        raise UsageError(f"{path}: {unknown[0]!r} is no input of {model}, which takes {takes}")
    for name, value in inputs.items():
        if name not in feeds and name not in bound and not value.is_initializer():
            raise UsageError(f"{path}: holds no {name!r}; {model} takes {takes}")
        if name in feeds and not _fits(feeds[name], value):
            array = feeds[name]
            given = f"{array.dtype}[{','.join(map(str, array.shape))}]"
            raise UsageError(f"{path}: {name!r} is {given}; {model} takes {_described(value)}")
    return feeds


def _read(path: Path) -> dict[str, Array]:
    require_fetched(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if isinstance(file, np.ndarray):
                raise UsageError(f"{path}: holds one array without a name; write it with numpy.savez(path, name=array)")
            return dict(file)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); give an .npz file") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: is not an .npz file of plain arrays ({error}); write it with numpy.savez") from error


def _fits(array: Array, value: ir.Value) -> bool:
    if not isinstance(value.type, ir.TensorType) or value.dtype is None:
        return True
    text = array.dtype.kind in "OSUT"
    if text != (value.dtype == ir.DataType.STRING) or not (text or array.dtype == value.dtype.numpy()):
        return False
    if value.shape is None:
        return True
    lengths = zip(array.shape, value.shape, strict=False)
    return array.ndim == value.shape.rank() and all(isinstance(d, ir.SymbolicDim) or n == d for n, d in lengths)


def _described(value: ir.Value) -> str:
    """`ids int64[N,16]`"""
    if not isinstance(value.type, ir.TensorType):
        return f"{value.name} {value.type}"
    axes = "" if value.shape is None else f"[{','.join('?' if str(d) == 'None' else str(d) for d in value.shape)}]"
    return f"{value.name} {str(value.dtype).lower()}{axes}"


def load_ids(path: str) -> tuple[int, ...]:
    """The whole numbers of an .npy file of one axis; never a pickle. ValueError for anything else."""
    require_fetched(Path(path))
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError("holds something else")
    return tuple(ids.tolist())

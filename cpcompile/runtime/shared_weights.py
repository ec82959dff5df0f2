"""The weights file of a bundle in memory once, for the engines of all contexts.

ONNX Runtime takes tensors from outside in place of those that a graph refers to. They lie in one mapping of the file,
whose pages are read when they are needed. It is not rearranged for the kernels (prepacked), which would copy it for
each engine. Rounded weights are: their kernels need it, and they are small.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from cpcompile.bundle.reader import Variant
from cpcompile.core.errors import CpcompileError
from cpcompile.files.external_data import references_of

DTYPES: Mapping[int, type[np.generic]] = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64}
"""By the numbers of TensorProto.DataType."""
Key = tuple[str, int, tuple[int, ...], int]
"""File, offset, dimensions and type of a tensor."""
NO_PREPACKING = "session.disable_prepacking"


class SharedWeights:
    """Mapped weights files, and the tensors in them that engines share."""

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}
        self._tensors: dict[Key, Any] = {}
        self._keys: dict[Path, tuple[Key, ...]] = {}

    def give_to(self, options: Any, variant: Variant) -> None:
        """Let the session of `variant`, which was verified, read its weights from here."""
        if variant.weights is None:
            return
        if variant.precision == "fp32":
            options.add_session_config_entry(NO_PREPACKING, "1")
        keys = []
        for each in references_of(variant.model):
            path = str(variant.weights / each.location)
            if path not in self._maps:
                with open(path, "rb") as file:  # noqa: PTH123  # the mapping keeps it open
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            key = (path, each.offset, each.dims, each.data_type)
            if key not in self._tensors:
                if each.data_type not in DTYPES:
                    raise CpcompileError(f"{variant.model}: {each.name} has the type {each.data_type}, not shared yet")
                dtype = np.dtype(DTYPES[each.data_type])
                count = int(np.prod(each.dims, dtype=np.int64))
                array = np.frombuffer(self._maps[path], dtype, count, each.offset).reshape(each.dims)
                self._tensors[key] = ort.OrtValue.ortvalue_from_numpy(array)
            options.add_initializer(each.name, self._tensors[key])
            keys.append(key)
        self._keys[variant.model] = tuple(keys)

    def bytes_of(self, variants: Iterable[Variant]) -> int:
        """What the weights of `variants` take, each counted once."""
        keys = {key for variant in variants for key in self._keys.get(variant.model, ())}
        return sum(self._tensors[key].tensor_size_in_bytes() for key in keys)

    def forget_pages(self) -> None:
        """Give the memory of all pages back; those that are needed again come from the file."""
        for each in self._maps.values():
            each.madvise(mmap.MADV_DONTNEED)

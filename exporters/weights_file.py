"""One weights file for many graphs: tensors are written once, graphs refer to them by offset and length.

Source: ONNX, docs/ExternalData.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

ALIGNMENT = 64
"""Offsets are multiples of a cache line, so that mapped pages can be read in place."""
INLINE = 1024
"""Tensors up to this many bytes stay in the graph: ONNX Runtime computes shapes with them when it loads."""


@dataclass(frozen=True)
class Location:
    """The position of a tensor in the weights file, in bytes."""

    offset: int
    length: int


def write_weights(
    path: Path, tensors: Iterable[tuple[str, Callable[[], npt.NDArray[np.generic]]]]
) -> Mapping[str, Location]:
    """Write named tensors one after the other; each is created only when it is written."""
    locations = {}
    with path.open("wb") as file:
        for name, make in tensors:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            offset = file.tell()
            file.write(np.ascontiguousarray(make()).reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer
            locations[name] = Location(offset, file.tell() - offset)
    return locations


def refer_to_weights(model: ir.Model, weights: Path, locations: Mapping[str, Location]) -> int:
    """Make the initializers of `model` that are in `weights` refer to it; return the bytes that they cover."""
    total = 0
    for name, value in model.graph.initializers.items():
        if (location := locations.get(name)) is None:
            continue
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            weights.name,
            location.offset,
            location.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=weights.parent,
        )
        total += location.length
    return total

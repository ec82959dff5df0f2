"""What a plan of TensorRT says of itself: its tensors, profiles and requirements."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpcompile.core.errors import UsageError
from cpcompile.targets.requests import CAPABILITY, FLAVOURS, PRECISIONS, Target

Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape, Shape]
"""The smallest, the best and the largest shape of an input."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Shapes of the inputs for which an engine is tuned together: input -> shapes."""

    name: str
    shapes: Mapping[str, Shapes]


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """An input or output; `shape` has a name where an axis is dynamic. `dtype` is numpy's name, or bfloat16."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class PlanInfo:
    """What a plan was built from, by what, and for what."""

    flavour: str
    version: str
    capabilities: tuple[str, ...]
    precision: str
    profiles: tuple[Profile, ...]
    tensors: tuple[TensorInfo, ...]
    onnx_digest: str
    """SHA-256 of the graph and its weights, in hex: equal for equal inputs, which plans need not be."""

    @property
    def settings_digest(self) -> str:
        """SHA-256 of everything that the library was told besides the graph."""
        plain = self._plain()
        settings = {key: plain[key] for key in ("flavour", "version", "compute_capabilities", "precision", "profiles")}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def to_plain(self) -> dict[str, Any]:
        """The content of `executor_info.tensorrt`."""
        return self._plain() | {"settings_digest": self.settings_digest}

    def _plain(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        plain["compute_capabilities"] = plain.pop("capabilities")
        result: dict[str, Any] = json.loads(json.dumps(plain))
        return result

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> PlanInfo:
        """What `to_plain` wrote; KeyError, TypeError or ValueError for what it cannot have written."""
        info = cls(
            flavour=_text(plain["flavour"]),
            version=_text(plain["version"]),
            capabilities=tuple(_text(each) for each in _items(plain["compute_capabilities"])),
            precision=_text(plain["precision"]),
            profiles=tuple(
                Profile(
                    name=_text(profile["name"]),
                    shapes={_text(name): _shapes(shapes) for name, shapes in profile["shapes"].items()},
                )
                for profile in _items(plain["profiles"])
            ),
            tensors=tuple(
                TensorInfo(
                    name=_text(tensor["name"]),
                    is_input=bool(tensor["is_input"]),
                    dtype=_text(tensor["dtype"]),
                    shape=tuple(axis if isinstance(axis, str) else _length(axis) for axis in _items(tensor["shape"])),
                )
                for tensor in _items(plain["tensors"])
            ),
            onnx_digest=_text(plain["onnx_digest"]),
        )
        inputs = {tensor.name: len(tensor.shape) for tensor in info.tensors if tensor.is_input}
        if (
            info.flavour not in FLAVOURS
            or info.precision not in PRECISIONS
            or not info.version.isprintable()
            or not all(CAPABILITY.fullmatch(each) for each in info.capabilities)
            or any({name: len(low) for name, (low, _, _) in each.shapes.items()} != inputs for each in info.profiles)
            or info.settings_digest != plain["settings_digest"]
        ):
            raise ValueError("executor_info.tensorrt")
        return info

    @property
    def built_for(self) -> str:
        """In words: `TensorRT-RTX 1.7.1 for sm86, sm120`."""
        gpus = ", ".join(self.capabilities) if self.capabilities else "the GPU of the machine that built it"
        return f"{self.flavour} {self.version} for {gpus}"

    @property
    def rebuild(self) -> str:
        """The options of `cpcompile build` that make such an engine again."""
        return f"--target {Target(self.flavour, self.capabilities)} --precision {self.precision}"

    def require_fit(self, plan: Path, *, version: str, capability: str | None = None) -> None:
        """UsageError unless the library `version`, and a GPU of `capability` where that is known, can run `plan`."""
        if version != self.version:
            raise UsageError(
                f"{plan}: was built by {self.built_for}, and here is {version}, which cannot load it; install that "
                f"version, or build it again: cpcompile build MODEL {self.rebuild}"
            )
        if capability is not None and self.capabilities and capability not in self.capabilities:
            wanted = Target(self.flavour, (*self.capabilities, capability))
            raise UsageError(
                f"{plan}: was built by {self.built_for}, and the GPU here is {capability}; build it again: "
                f"cpcompile build MODEL --target {wanted} --precision {self.precision}"
            )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _length(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no length")
    return value


def _items(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def _shapes(value: object) -> Shapes:
    low, best, high = (tuple(_length(axis) for axis in _items(shape)) for shape in _items(value))
    return low, best, high

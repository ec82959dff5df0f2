"""What a bundle records of a TensorRT plan: its tensors and profiles, and what it was built by and for.

    PlanInfo <-> executor_info.tensorrt of component.json

A plan runs only with the library version that built it, and only on the GPUs that it was built for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpcompile.core.errors import UsageError
from cpcompile.targets.requests import CAPABILITY, FLAVOURS, PRECISIONS, RTX_PRECISIONS, Target

Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape, Shape]
"""The smallest, the optimal and the largest shape of an input."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The shapes that an engine is tuned for together, by input."""

    name: str
    shapes: Mapping[str, Shapes]


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """An input or output. Dynamic axes have a name in `shape`; `dtype` is the name in numpy, or bfloat16."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class PlanInfo:
    """The graph, library, GPUs and profiles that a plan was built from and for."""

    flavour: str
    version: str
    capabilities: tuple[str, ...]
    precision: str
    profiles: tuple[Profile, ...]
    tensors: tuple[TensorInfo, ...]
    onnx_digest: str
    """SHA-256 of the graph and its weights in hex. Equal inputs have equal digests; their plans may differ."""
    rounded: tuple[str, ...] = ()
    """The parameters that it has in the scheme that `precision` names."""

    @property
    def settings_digest(self) -> str:
        """SHA-256 of all settings of the build besides the graph."""
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
        """The inverse of `to_plain`; KeyError, TypeError or ValueError for anything that it cannot have written."""
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
            rounded=tuple(_text(each) for each in _items(plain.get("rounded", []))),
        )
        inputs = {tensor.name: len(tensor.shape) for tensor in info.tensors if tensor.is_input}
        if (
            info.flavour not in FLAVOURS
            or info.precision not in RTX_PRECISIONS
            or (info.precision in PRECISIONS) == bool(info.rounded)
            or not info.version.isprintable()
            or not all(CAPABILITY.fullmatch(each) for each in info.capabilities)
            or any({name: len(low) for name, (low, _, _) in each.shapes.items()} != inputs for each in info.profiles)
            or info.settings_digest != plain["settings_digest"]
        ):
            raise ValueError("executor_info.tensorrt")
        return info

    @property
    def built_for(self) -> str:
        """A phrase such as `tensorrt-rtx 1.7.1 for sm86, sm120`."""
        gpus = ", ".join(self.capabilities) if self.capabilities else "the GPU of the machine that built it"
        return f"{self.flavour} {self.version} for {gpus}"

    @property
    def rebuild(self) -> str:
        """The options of `cpcompile build` that build such an engine again."""
        return f"--target {Target(self.flavour, self.capabilities)} --precision {self.precision}"

    def require_fit(self, plan: Path, *, version: str, capability: str | None = None) -> None:
        """UsageError unless library `version` can run `plan`, on a GPU of `capability` where that is known."""
        if version != self.version:
            raise UsageError(
                f"{plan}: was built by {self.built_for}; the installed {version} cannot load it. Install "
                f"version {self.version}, or build it again: cpcompile build MODEL {self.rebuild}"
            )
        if capability is not None and self.capabilities and capability not in self.capabilities:
            wanted = Target(self.flavour, (*self.capabilities, capability))
            raise UsageError(
                f"{plan}: was built by {self.built_for}, and the GPU here is {capability}; build it again: "
                f"cpcompile build MODEL --target {wanted} --precision {self.precision}"
            )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _length(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a length")
    return value


def _items(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


def _shapes(value: object) -> Shapes:
    low, best, high = (tuple(_length(axis) for axis in _items(shape)) for shape in _items(value))
    return low, best, high

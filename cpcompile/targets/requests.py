"""What an engine is built for: as a command line asks for it, and as a bundle records it.

    tensorrt-rtx=sm86,sm120 -> Target        sequence=1:128:512 -> Range of an axis
    EngineInfo <-> executor_info.tensorrt    of a bundle

A plan runs on the version that built it and on the GPUs that it was built for, so a bundle says what these are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cpcompile.core.errors import UsageError

TENSORRT, TENSORRT_RTX = FLAVOURS = ("tensorrt", "tensorrt-rtx")
"""Of libraries that compile plans."""
CUDA = "cuda"
"""ONNX Runtime on a GPU of NVIDIA."""
PRECISIONS = ("fp32", "fp16", "bf16")
DEFAULT_PRECISION = "fp16"
CAPABILITIES = MappingProxyType({TENSORRT: (), TENSORRT_RTX: ("sm86", "sm89", "sm120")})
"""What is built for if nothing is said: GeForce and RTX of Ampere, Ada and Blackwell; none stands for the GPU there."""
CAPABILITY = re.compile(r"sm\d{2,3}", re.ASCII)
LARGEST = 2**31 - 1

Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape, Shape]
"""The smallest, the best and the largest shape of an input."""


@dataclass(frozen=True)
class Target:
    """What runs engines on a GPU of NVIDIA, and the compute capabilities to build for.

    None for all GPUs (`cuda`), or for the one in this machine (`tensorrt`).
    """

    flavour: str
    capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.flavour not in (*FLAVOURS, CUDA):
            raise UsageError(f"there is no target {self.flavour!r}; there are {', '.join((*FLAVOURS, CUDA))}")
        if self.flavour == CUDA and self.capabilities:
            raise UsageError("--target cuda builds for every GPU; leave the capabilities out")
        if self.flavour == TENSORRT and self.capabilities:
            raise UsageError("--target tensorrt builds for the GPU in this machine; leave the capabilities out")
        for each in self.capabilities:
            if not CAPABILITY.fullmatch(each):
                raise UsageError(f"{each!r} is no compute capability; write it like sm86 (8.6) or sm120 (12.0)")

    def __str__(self) -> str:
        return self.flavour + (f"={','.join(self.capabilities)}" if self.capabilities else "")


def parse_target(text: str) -> Target:
    """`tensorrt`, `tensorrt-rtx`, `tensorrt-rtx=sm86,sm120`."""
    flavour, equals, names = text.partition("=")
    given = tuple(dict.fromkeys(name.strip().lower() for name in names.split(",") if name.strip()))
    if equals and not given:
        raise UsageError(f"--target {text}: names no compute capability; write {flavour}=sm86,sm120, or {flavour}")
    return Target(flavour, given or CAPABILITIES.get(flavour, ()))


@dataclass(frozen=True)
class Range:
    """Lengths of an axis that an engine takes, and the one that it is tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max <= LARGEST:
            raise UsageError(f"{self}: lengths go from the smallest over the best to the largest, min:opt:max")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


def parse_ranges(texts: Sequence[str]) -> dict[str, Range]:
    """`sequence=1:128:512` -> the range of the axis `sequence`; a length alone stands for all three."""
    ranges = {}
    for text in texts:
        name, _, lengths = text.partition("=")
        numbers = lengths.split(":")
        if not name or len(numbers) not in (1, 3) or not all(re.fullmatch("[0-9]{1,20}", n) for n in numbers):
            raise UsageError(
                f"--profile {text!r}: write the lengths of an axis as name=min:opt:max, sequence=1:128:512"
            )
        if name in ranges:
            raise UsageError(f"--profile {name}: is given twice; one range per axis")
        low, best, high = map(int, numbers * 3 if len(numbers) == 1 else numbers)
        try:
            ranges[name] = Range(low, best, high)
        except UsageError as error:
            raise UsageError(f"--profile {name}={error}") from None
    return ranges


@dataclass(frozen=True, kw_only=True)
class Added:
    """The engines for GPUs that a build adds: every target in every precision."""

    targets: tuple[Target, ...] = ()
    precisions: tuple[str, ...] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)


NOTHING_ADDED = Added()


def parse_targets(targets: Sequence[str], precisions: Sequence[str] | None, profiles: Sequence[str]) -> Added:
    """`--target`, `--precision` and `--profile` as they were given; UsageError if they do not go together."""
    if not targets and (precisions or profiles):
        option = "--precision" if precisions else "--profile"
        raise UsageError(f"{option} is of engines that --target adds; name one, or leave it out")
    for each in precisions or ():
        if each not in PRECISIONS:
            raise UsageError(f"--precision {each!r} does not exist; there are {', '.join(PRECISIONS)}")
    parsed = tuple(parse_target(text) for text in targets)
    if len({target.flavour for target in parsed}) < len(parsed):
        raise UsageError("--target: one per library; write its compute capabilities together, tensorrt-rtx=sm86,sm120")
    return Added(
        targets=parsed,
        precisions=tuple(precisions or (DEFAULT_PRECISION,)) if parsed else (),
        ranges=parse_ranges(profiles),
    )


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
class EngineInfo:
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
    def from_plain(cls, plain: Mapping[str, Any]) -> EngineInfo:
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

"""What an engine is built for: as a command line asks for it, and as a bundle records it.

    tensorrt-rtx=sm86,sm120 -> Target        sequence=1:128:512 -> Range of an axis
    PlanInfo <-> executor_info.tensorrt    of a bundle

A plan runs on the version that built it and on the GPUs that it was built for, so a bundle says what these are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

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

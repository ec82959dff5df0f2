"""Engines that a command line requests: their targets, precisions, and ranges of dynamic axes.

tensorrt-rtx=sm86,sm120 -> Target        sequence=1:128:512 -> Range of an axis
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from cpcompile.core.config import ROUNDED
from cpcompile.core.errors import UsageError

TENSORRT, TENSORRT_RTX = FLAVOURS = ("tensorrt", "tensorrt-rtx")
"""The libraries that build plans."""
CUDA = "cuda"
"""ONNX Runtime on an NVIDIA GPU."""
OPENVINO = "openvino"
"""OpenVINO on the CPU, which reads the weights of the engines in float32."""
CPU = "cpu"
"""ONNX Runtime on the CPU, with weights in few bits; its engines in float32 are always built."""
BEST = "best"
"""The fastest engine for this CPU that keeps the quality budget, in whichever precisions."""
PRECISIONS = ("fp32", "fp16", "bf16")
"""Those of engines for GPUs."""
RTX_PRECISIONS = (*PRECISIONS, "int4-weights")
"""Those of TensorRT-RTX: also weights in 4 bits, and the rest in float16. TensorRT takes neither blocks of 32 channels
nor scales below 0."""
OPENVINO_PRECISIONS = ("fp32", "bf16")
DEFAULT_PRECISIONS = MappingProxyType(
    {CPU: ("int8",), **dict.fromkeys((*FLAVOURS, CUDA), ("fp16",)), OPENVINO: ("bf16",), BEST: ROUNDED}
)
CAPABILITIES = MappingProxyType({TENSORRT: (), TENSORRT_RTX: ("sm86", "sm89", "sm120")})
"""The defaults: GeForce and RTX of Ampere, Ada and Blackwell; an empty tuple means the GPU in the machine."""
CAPABILITY = re.compile(r"sm\d{2,3}", re.ASCII)
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Target:
    """A library that runs engines, and the compute capabilities of NVIDIA GPUs to build for.

    Without capabilities, `cuda` builds for all GPUs and `tensorrt` for the one in this machine.
    """

    flavour: str
    capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.flavour not in DEFAULT_PRECISIONS:
            raise UsageError(f"there is no target {self.flavour!r}; there are {', '.join(DEFAULT_PRECISIONS)}")
        if self.flavour in (CPU, OPENVINO) and self.capabilities:
            raise UsageError(f"--target {self.flavour} builds for every processor; omit the capabilities")
        if self.flavour == BEST and self.capabilities:
            raise UsageError("--target best chooses by what this machine measures; omit the capabilities")
        if self.flavour == CUDA and self.capabilities:
            raise UsageError("--target cuda builds for every GPU; omit the capabilities")
        if self.flavour == TENSORRT and self.capabilities:
            raise UsageError("--target tensorrt builds for the GPU in this machine; omit the capabilities")
        for each in self.capabilities:
            if not CAPABILITY.fullmatch(each):
                raise UsageError(f"{each!r} is not a compute capability; write it like sm86 (8.6) or sm120 (12.0)")

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that engines for this target can have."""
        if self.flavour in (CPU, BEST):
            return ROUNDED
        if self.flavour == TENSORRT_RTX:
            return RTX_PRECISIONS
        return OPENVINO_PRECISIONS if self.flavour == OPENVINO else PRECISIONS

    def __str__(self) -> str:
        return self.flavour + (f"={','.join(self.capabilities)}" if self.capabilities else "")


def parse_target(text: str) -> Target:
    """Parse `tensorrt`, `tensorrt-rtx` or `tensorrt-rtx=sm86,sm120`."""
    flavour, equals, names = text.partition("=")
    given = tuple(dict.fromkeys(name.strip().lower() for name in names.split(",") if name.strip()))
    if equals and not given:
        raise UsageError(f"--target {text}: names no compute capability; write {flavour}=sm86,sm120, or {flavour}")
    return Target(flavour, given or CAPABILITIES.get(flavour, ()))


@dataclass(frozen=True)
class Range:
    """The lengths of an axis that an engine accepts, and the one that it is tuned for."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max <= LARGEST:
            raise UsageError(f"{self}: write the lengths in ascending order, min:opt:max")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


def parse_ranges(texts: Sequence[str]) -> dict[str, Range]:
    """Parse `sequence=1:128:512` into the range of the axis `sequence`; a single length stands for all three."""
    ranges = {}
    for text in texts:
        name, _, lengths = text.partition("=")
        numbers = lengths.split(":")
        if not name or len(numbers) not in (1, 3) or not all(re.fullmatch("[0-9]{1,20}", n) for n in numbers):
            raise UsageError(
                f"--profile {text!r}: write the lengths of an axis as name=min:opt:max, for example sequence=1:128:512"
            )
        if name in ranges:
            raise UsageError(f"--profile {name}: is given twice; give one range per axis")
        low, best, high = map(int, numbers * 3 if len(numbers) == 1 else numbers)
        try:
            ranges[name] = Range(low, best, high)
        except UsageError as error:
            raise UsageError(f"--profile {name}={error}") from None
    return ranges


@dataclass(frozen=True, kw_only=True)
class Added:
    """The engines that a build adds: every target in its default precisions, or in those given that it can have."""

    targets: tuple[Target, ...] = ()
    precisions: tuple[str, ...] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def precisions_of(self, target: Target) -> tuple[str, ...]:
        """Those in which engines for `target` are built."""
        chosen = self.precisions or DEFAULT_PRECISIONS[target.flavour]
        return tuple(each for each in chosen if each in target.precisions)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The precisions from which `best` chooses; none if it was not requested."""
        return self._precisions_of(BEST)

    @property
    def rounded(self) -> tuple[str, ...]:
        """The precisions whose weights are rounded, as a calibration says if there is one."""
        every = dict.fromkeys(each for target in self.targets for each in self.precisions_of(target))
        return tuple(each for each in every if each in ROUNDED)

    @property
    def openvino_candidates(self) -> tuple[str, ...]:
        """The precisions of OpenVINO's engines, which `best` then considers too."""
        return self._precisions_of(OPENVINO) if self._precisions_of(BEST) else ()

    @property
    def independent(self) -> tuple[tuple[Target, str], ...]:
        """Target and precision of engines that need no others: OpenVINO's read weights in float32, `best` chooses."""
        alone = [target for target in self.targets if target.flavour not in (BEST, OPENVINO)]
        return tuple((target, precision) for target in alone for precision in self.precisions_of(target))

    def _precisions_of(self, flavour: str) -> tuple[str, ...]:
        return next((self.precisions_of(target) for target in self.targets if target.flavour == flavour), ())


NOTHING_ADDED = Added()


def parse_targets(
    targets: Sequence[str],
    precisions: Sequence[str] | None,
    profiles: Sequence[str],
    search_seconds: float | None = None,
) -> Added:
    """Parse the values of `--target`, `--precision` and `--profile`.

    UsageError if they do not fit together, or to `--search-seconds`.
    """
    if not targets and (precisions or profiles):
        option = "--precision" if precisions else "--profile"
        raise UsageError(f"{option} applies to engines that --target adds; add a --target, or omit it")
    parsed = tuple(parse_target(text) for text in targets)
    if search_seconds is not None and BEST not in {target.flavour for target in parsed}:
        raise UsageError("--search-seconds applies to the search of --target best; add that target, or omit it")
    if len({target.flavour for target in parsed}) < len(parsed):
        raise UsageError("--target: give one per library, with all its compute capabilities: tensorrt-rtx=sm86,sm120")
    known = dict.fromkeys(name for target in parsed for name in target.precisions)
    for each in precisions or ():
        if each not in known:
            raise UsageError(f"--precision {each!r} does not exist; there are {', '.join(known)}")
    if {CPU, BEST} <= {target.flavour for target in parsed}:
        raise UsageError("--target best tries the precisions of the CPU and adds one engine; leave --target cpu out")
    added = Added(targets=parsed, precisions=tuple(precisions or ()), ranges=parse_ranges(profiles))
    for target in parsed:
        if not added.precisions_of(target):
            names = ", ".join(added.precisions)
            raise UsageError(f"--target {target}: has none of the precisions {names}; add one, or omit it")
    if profiles and all(target.flavour in (CPU, OPENVINO, BEST) for target in parsed):
        raise UsageError("--profile applies to engines for GPUs; engines for the CPU take every length")
    return added

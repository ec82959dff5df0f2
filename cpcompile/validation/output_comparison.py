"""Two ONNX files: do they compute the same?

Both run in ONNX Runtime on the same inputs. The tolerance is measured, not chosen: the original runs with and
without the runtime's graph optimisations, and the largest difference between the two, times a stated multiple,
is what a rewrite may differ by; at least a stated number of roundings of the largest output, for models
in which the runtime optimises nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from cpcompile.core.measured import NotMeasured
from cpcompile.core.types import Array, Feeds
from cpcompile.files.onnx_file import load_onnx
from cpcompile.validation.array_errors import ArrayErrors
from cpcompile.validation.input_uses import InputRange
from cpcompile.validation.random_inputs import MORE_LENGTHS, RandomInputs, dtype_of

MULTIPLE = 8.0
ROUNDINGS = 64
Verdict = Literal["pass", "fail", "inconclusive"]
WITHOUT_NUMPY = frozenset(("tensor(bfloat16)", "tensor(int4)", "tensor(uint4)"))
"""Types that ONNX Runtime does not exchange with Python."""


@dataclass(frozen=True)
class OutputComparison:
    """One output over all runs."""

    name: str
    max_abs_error: float | None
    """None if shapes or types differ."""
    tolerance: float | None
    reason: str | None
    """Why it is not equal."""
    ratios: Mapping[str, float | NotMeasured] = field(default_factory=dict)
    """How far it is from the original over all runs, see `difference`; empty where that makes no sense."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Whether two files are the same function; true if they are."""

    verdict: Verdict
    reason: str | None = None
    runs: int = 0
    """Inputs on which both were compared."""
    outputs: Sequence[OutputComparison] = ()
    drawn: Sequence[InputRange] = ()
    """The whole numbers that were drawn for random inputs."""
    tolerance_source: str = (
        f"{MULTIPLE:g} x the original with against without runtime optimisations, "
        f"at least {ROUNDINGS} roundings of the largest value"
    )

    def __bool__(self) -> bool:
        return self.verdict == "pass"


def compare_files(
    original: Path,
    candidate: Path,
    *,
    inputs: Sequence[Feeds] = (),
    bound: Mapping[str, int] | None = None,
    rounds: int = 1,
) -> Comparison:
    """Run both on `inputs` and on so many rounds of random inputs.

    `bound` gives inputs of the original that are constants in the candidate. Without `inputs` the result is
    inconclusive if the graph does not say which whole numbers an input takes.
    """
    bound = bound or {}
    try:
        plain, optimised = _open(original, optimise=False), _open(original, optimise=True)
    except Exception as error:  # ONNX Runtime has no common error class
        return Comparison(verdict="inconclusive", reason=f"ONNX Runtime cannot load the original: {_first_line(error)}")
    try:
        other = _open(candidate, optimise=False)
    except Exception as error:
        return _different(f"ONNX Runtime cannot load the result: {_first_line(error)}")
    names, got_names = ([out.name for out in session.get_outputs()] for session in (plain, other))
    if names != got_names:
        return _different(f"the outputs are {', '.join(got_names)} instead of {', '.join(names)}")
    wanted = [value.name for value in plain.get_inputs() if value.name not in bound]
    if wanted != [value.name for value in other.get_inputs()]:
        return _different(f"the inputs are no longer {', '.join(wanted)}")

    for value in (*plain.get_inputs(), *plain.get_outputs()):
        if value.type in WITHOUT_NUMPY:
            return Comparison(
                verdict="inconclusive",
                reason=f"{value.name} is a {value.type}, which ONNX Runtime does not exchange with Python",
            )

    worst: dict[str, OutputComparison] = {}
    blank = list(names)
    differences = {name: ArrayErrors() for name in names}
    runs, refusal = 0, "there are no inputs to try"
    for value in plain.get_inputs():
        if dtype_of(value) is None:
            hint = "; give --input" if value.type.startswith("tensor(") else ""  # a .npz holds no sequences
            refusal = f"{value.name} is a {value.type}, which is not drawn at random{hint}"
    drawn = RandomInputs(plain, load_onnx(original), rounds=rounds)
    groups = (("given", inputs), ("random", drawn), ("last resort", drawn.of(MORE_LENGTHS)))
    for kind, feeds in ((kind, feeds) for kind, group in groups for feeds in group):
        if runs and kind == "last resort":
            break
        feeds = {**feeds, **{v.name: _bound_array(v, bound[v.name]) for v in plain.get_inputs() if v.name in bound}}
        try:
            expected, noise = (session.run(names, feeds) for session in (plain, optimised))
        except Exception as error:
            if kind == "given":
                return Comparison(verdict="inconclusive", reason=f"the original refuses an input: {_first_line(error)}")
            refusal = f"the original refuses random inputs ({_first_line(error)}); give --input"
            continue
        try:
            got = other.run(names, {name: feeds[name] for name in wanted})
        except Exception as error:
            return _different(f"the result refuses what the original takes: {_first_line(error)}")
        runs += 1
        for name, *arrays in zip(names, expected, noise, got, strict=True):
            now = compare_arrays(name, *arrays)
            if name in blank and _says_something(arrays[0]):
                blank.remove(name)
            if now.max_abs_error is not None and isinstance(arrays[0], np.ndarray) and arrays[0].dtype.kind == "f":
                finite = np.isfinite(arrays[0])
                differences[name].add(arrays[0][finite], arrays[2][finite])
            worst[name] = max(worst.get(name, now), now, key=_badness)
    ranges = tuple(each for each in drawn.ranges.values() if each.name not in bound)
    if not runs:
        return Comparison(verdict="inconclusive", reason=refusal, drawn=ranges)
    verdict, reason = _verdict(
        list(worst.values()), () if inputs else ranges, [name for name in names if name in blank]
    )
    return Comparison(
        verdict=verdict,
        reason=reason,
        runs=runs,
        drawn=ranges,
        outputs=tuple(
            replace(out, ratios=differences[name].ratios()) if differences[name].elements else out
            for name, out in worst.items()
        ),
    )


def _verdict(
    outputs: Sequence[OutputComparison], drawn: Sequence[InputRange], blank: Sequence[str]
) -> tuple[Verdict, str | None]:
    """The verdict and its reason if the runs with `drawn` numbers are all that there are.

    blank: outputs of which no run says anything.
    """
    if wrong := [out for out in outputs if out.reason]:
        return "fail", f"{wrong[0].name}: {wrong[0].reason}"
    if guessed := [each for each in drawn if not each.known]:
        each = guessed[0]
        return "inconclusive", (
            f"the graph does not say which numbers the input {each.name} takes ({each.source}); "
            f"{each.low} to {each.high} were drawn; give --input"
        )
    if blank:
        return "inconclusive", (
            f"{blank[0]}: in the original it is empty or has no finite number, whatever the input was; "
            "give an input with --input for which it has"
        )
    return "pass", None


def _says_something(output: Any) -> bool:
    """Whether an output of the original holds anything that another can be compared with."""
    if isinstance(output, list):
        return any(_says_something(each) for each in output)
    if not isinstance(output, np.ndarray):
        return True
    return bool(np.isfinite(output).any()) if output.dtype.kind in "fc" else output.size > 0


def _different(reason: str) -> Comparison:
    return Comparison(verdict="fail", reason=reason)


def given_or_random(path: Path, inputs: Sequence[Feeds]) -> list[Feeds]:
    """`inputs`, or random ones that the model in `path` accepts."""
    if inputs:
        return list(inputs)
    session = _open(path, optimise=False)
    drawn = RandomInputs(session, load_onnx(path))
    accepted = [feeds for feeds in drawn if _accepts(session, feeds)]
    return accepted or [feeds for feeds in drawn.of(MORE_LENGTHS) if _accepts(session, feeds)]


def _accepts(session: ort.InferenceSession, feeds: Feeds) -> bool:
    try:
        session.run(None, feeds)
    except Exception:  # ONNX Runtime has no common error class
        return False
    return True


def _open(path: Path, *, optimise: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _bound_array(value: Any, number: int) -> Array:
    return np.asarray(number, dtype=dtype_of(value))


def compare_arrays(
    name: str, expected: Any, noise: Any, got: Any, *, roundings: float = ROUNDINGS, multiple: float = MULTIPLE
) -> OutputComparison:
    """Whether `got` is `expected`, of which `noise` is another, equally valid version.

    Integers and values that are not arrays have to be equal; NaN and infinity have to be in the same places. Of a
    sequence, the worst element counts.
    """
    if isinstance(expected, list) and isinstance(got, list):
        if len(expected) != len(got):
            return OutputComparison(name, None, None, f"it has {len(got)} elements instead of {len(expected)}")
        pairs = zip(expected, noise if len(noise) == len(expected) else expected, got, strict=True)
        each = [compare_arrays(name, *pair, roundings=roundings, multiple=multiple) for pair in pairs]
        return max(each, key=_badness, default=OutputComparison(name, 0.0, 0.0, None))
    if not isinstance(expected, np.ndarray) or not isinstance(got, np.ndarray):
        same = expected == got
        return OutputComparison(name, None, None, None if same else "it is another value")
    if expected.shape != got.shape or expected.dtype != got.dtype:
        reason = f"it is {got.dtype} {list(got.shape)} instead of {expected.dtype} {list(expected.shape)}"
        return OutputComparison(name, None, None, reason)
    if noise.shape != expected.shape:  # the runtime believed a wrong shape in the file
        noise = expected
    if expected.dtype.kind == "c":  # real and imaginary parts side by side
        expected, noise, got = (array.view(array.real.dtype) for array in (expected, noise, got))
    if expected.dtype.kind != "f":
        different = int((expected != got).sum())
        missed = f"{different} of {got.size} elements differ"
        return OutputComparison(name, float(different > 0), 0.0, missed if different else None)
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], got[~finite], equal_nan=True):
        return OutputComparison(name, None, None, "it is not finite elsewhere than the original")
    if not np.isfinite(got[finite]).all():
        return OutputComparison(name, None, None, "it is not finite where the original is")
    exact = expected[finite].astype(np.float64)
    error = float(np.abs(got[finite].astype(np.float64) - exact).max(initial=0.0))
    runtime = np.nan_to_num(np.abs(noise[finite].astype(np.float64) - exact), posinf=0.0).max(initial=0.0)
    rounding = roundings * float(np.finfo(expected.dtype).eps) * float(np.abs(exact).max(initial=0.0))
    tolerance = max(multiple * float(runtime), rounding)
    missed = f"it differs by {error:.2g}, allowed are {tolerance:.2g}"
    return OutputComparison(name, error, tolerance, None if error <= tolerance else missed)


def _badness(out: OutputComparison) -> tuple[bool, float]:
    if out.max_abs_error is None or not out.tolerance:
        return out.reason is not None, out.max_abs_error or 0.0
    return out.reason is not None, out.max_abs_error / out.tolerance


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

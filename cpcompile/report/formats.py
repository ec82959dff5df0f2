"""How numbers are written for people, in a terminal and on a page alike; a dash marks a value that was not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeGuard

from cpcompile.core.measured import Measurements, NotMeasured
from cpcompile.report.results import LayerError, ShapeSpeed

NOTHING = "–"
NO_FAILURE = "parity did not fail"
"""Reason why there is no first differing node."""
FACTOR = 9
"""A relative change of at least this is written as a factor."""
KINDS: Mapping[str, str] = {
    "ffn": "FFN blocks",
    "head": "attention heads",
    "vocabulary": "vocabulary rows",
    "expert": "experts",
    "layer": "layers",
}
"""Names of the units of each kind."""


def number(value: float | NotMeasured | None, form: str = ".4g") -> str:
    """`value` in the format `form`."""
    return format(value, form) if is_known(value) else NOTHING


def count(value: int) -> str:
    """Thousands and millions with two or three digits: 1.13 M, 96.0 k, 512."""
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.1f} k" if value >= 1e3 else str(value)


def megabytes(value: float | NotMeasured | None) -> str:
    """Bytes as MB of 10^6 bytes, small sizes as kB."""
    if not is_known(value):
        return NOTHING
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def percent(part: float | NotMeasured | None, form: str = ".0f") -> str:
    """0.41 -> 41 %."""
    return f"{100 * part:{form}} %" if is_known(part) else NOTHING


def increase(part: float, error: float) -> str:
    """A relative increase with three times its standard error: +1.20 % ± 0.31 %."""
    return f"{100 * part:+.2f} % ± {300 * error:.2f} %"


def change(before: float | NotMeasured | None, after: float | NotMeasured | None) -> str:
    """`after` against `before`: +1.2 %."""
    return signed(after / before - 1 if before and is_known(after) else None)


def plain(value: float) -> str:
    """A number of any kind: integers whole, others with four significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def signed(part: float | NotMeasured | None) -> str:
    """A relative change: +1.2 %, or 12 × from a factor of 10."""
    if not part:
        return "0 %" if is_known(part) else NOTHING
    if part >= FACTOR:
        return f"{1 + part:.3g} ×"
    return f"{100 * part:+{'.1f' if abs(part) >= 5e-4 else '.1g'}} %".replace("-", "−")


def arrow(sides: tuple[str, str]) -> str:
    """before → after, or just one if they are equal."""
    return sides[0] if sides[0] == sides[1] else " → ".join(sides)


def short(value: float | NotMeasured | None) -> str:
    """Three significant digits, or all before the point: 3.11, 86.1, 1,139."""
    if not is_known(value):
        return NOTHING
    return f"{value:,.0f}" if 1000 <= value < 1e9 else f"{value:#.3g}".rstrip(".")


def milliseconds(value: float | NotMeasured | None) -> str:
    """As `short`: 0.182 ms, 27.5 ms, 1,200 ms."""
    return f"{short(value)} ms" if is_known(value) else NOTHING


def shape_name(shape: ShapeSpeed) -> str:
    """batch×sequence of a timed shape."""
    return f"{shape.batch}×{shape.sequence}" if shape.sequence else f"batch {shape.batch}"


def module_name(error: LayerError) -> str:
    """The module of an entry of the errors by layer."""
    return error.module or "the whole model"


def is_known(value: float | NotMeasured | None) -> TypeGuard[float]:
    """Whether there is a number."""
    return value is not None and not isinstance(value, NotMeasured)


def gaps(result: object) -> Iterator[tuple[str, str]]:
    """(field, reason) of everything in and below the dataclass `result` that was not measured.

    A verdict that was not requested is not a gap, nor is a divergence where there is none.
    """
    if isinstance(result, Measurements):
        yield from (gap for gap in result.not_measured.items() if gap[0] != "verdict" and gap[1] != NO_FAILURE)
    if isinstance(result, list | tuple):
        for item in result:
            yield from gaps(item)
    elif isinstance(result, Mapping):
        yield from gaps(list(result.values()))
    elif dataclasses.is_dataclass(result):
        yield from gaps([getattr(result, each.name) for each in dataclasses.fields(result)])

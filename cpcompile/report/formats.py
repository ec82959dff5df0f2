"""How numbers are written for people, in a terminal and on a page alike; a dash stands for what was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NOTHING = "–"
NO_FAILURE = "parity did not fail"
"""Why there is no first node that differs."""
FACTOR = 9
"""A change of more than this is written as a factor."""
KINDS: Mapping[str, str] = {
    "ffn": "FFN blocks",
    "head": "attention heads",
    "vocabulary": "vocabulary rows",
    "expert": "experts",
    "layer": "layers",
}
"""What the units of a kind are called."""


def number(value: float | None, form: str = ".4g") -> str:
    """`value` in the format `form`."""
    return NOTHING if value is None else format(value, form)


def count(value: int) -> str:
    """Thousands and millions with two or three digits: 1.13 M, 96.0 k, 512."""
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.1f} k" if value >= 1e3 else str(value)


def megabytes(value: float | None) -> str:
    """Bytes as MB of 10^6 bytes, few as kB."""
    if value is None:
        return NOTHING
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def percent(part: float | None, form: str = ".0f") -> str:
    """0.41 -> 41 %."""
    return NOTHING if part is None else f"{100 * part:{form}} %"


def change(before: float | None, after: float | None) -> str:
    """Of `after` against `before`: +1.2 %."""
    return signed(after / before - 1 if before and after is not None else None)


def plain(value: float) -> str:
    """Of any kind: integers whole, others with four significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def signed(part: float | None) -> str:
    """A relative change: +1.2 %, or from 10 times on 12 ×."""
    if not part:
        return NOTHING if part is None else "0 %"
    if part >= FACTOR:
        return f"{1 + part:.3g} ×"
    return f"{100 * part:+{'.1f' if abs(part) >= 5e-4 else '.1g'}} %".replace("-", "−")


def arrow(sides: tuple[str, str]) -> str:
    """before → after, or the one where they are equal."""
    return sides[0] if sides[0] == sides[1] else " → ".join(sides)


def short(value: float | None) -> str:
    """Three significant digits, or all before the point: 3.11, 86.1, 1,139."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if 1000 <= value < 1e9 else f"{value:#.3g}".rstrip(".")


def milliseconds(value: float | None) -> str:
    """As `short`: 0.182 ms, 27.5 ms, 1,200 ms."""
    return NOTHING if value is None else f"{short(value)} ms"


def shape_name(shape: Mapping[str, Any]) -> str:
    """batch×sequence of a timed shape."""
    return f"{shape['batch']}×{shape['sequence']}" if shape["sequence"] else f"batch {shape['batch']}"


def module_name(error: Mapping[str, Any]) -> str:
    """Of an entry of the errors by layer."""
    return str(error["module"] or "the whole model")


def gaps(node: Any) -> Iterator[tuple[str, str]]:
    """(field, reason) of everything in and below `node` that was not measured.

    A verdict that nobody asked for is no gap, nor a divergence where there is none.
    """
    if isinstance(node, list):
        for item in node:
            yield from gaps(item)
    elif isinstance(node, dict):
        for key, reason in node.get("not_measured", {}).items():
            if key != "verdict" and reason != NO_FAILURE:
                yield key, reason
        for value in node.values():
            yield from gaps(value)

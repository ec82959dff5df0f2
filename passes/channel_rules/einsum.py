"""Einsum: a letter is an axis; letters of the result are coupled, and sums over other letters can drop zeros."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from cpcompile.passes.channel_rules.rule import Rule, keep_all
from cpcompile.passes.channels import Cell, Channels, Mask, Zeros


def _cells(channels: Channels, node: ir.Node) -> tuple[dict[str, list[Cell]], dict[str, int]] | str:
    """Per letter the axes of the operands, and the axis of the result; or why they are not known."""
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        counts = Counter(left.replace(",", ""))
        right = "".join(sorted(letter for letter, count in counts.items() if count == 1))
    if "." in equation:
        return "axes behind an ellipsis have no letter"
    if any(len(set(term)) < len(term) for term in (*terms, right)):
        return "a repeated letter is a diagonal"
    values = [(*pair,) for pair in zip((*node.inputs, node.outputs[0]), (*terms, right), strict=True)]
    cells: dict[str, list[Cell]] = {}
    for value, term in values:
        shape = channels.shape(value)
        if value is None or shape is None or len(shape) != len(term):
            return "its shapes are unknown"
        for axis, letter in enumerate(term):
            cells.setdefault(letter, []).append((value, axis))
    if any(len({_length(channels, cell) for cell in own}) > 1 for own in cells.values()):
        return "an axis of length 1 is broadcast, or lengths may differ"
    results = {letter: axis for axis, letter in enumerate(right)}
    return {letter: own[: -1 if letter in results else None] for letter, own in cells.items()}, results


def _length(channels: Channels, cell: Cell) -> object:
    """What has to be equal along one letter; an axis of one channel fits all, because nothing can be cut from it."""
    shape = channels.shape(cell[0])
    return 1 if shape is None or shape[cell[1]].n == 1 else shape[cell[1]]


def _zero_terms(channels: Channels, cells: Sequence[Cell]) -> Mask:
    """A product is zero where one of its factors is."""
    return np.asarray(np.logical_or.reduce([channels.zero(value).axes[axis] for value, axis in cells]))


def _agree(channels: Channels, node: ir.Node) -> None:
    found = _cells(channels, node)
    if isinstance(found, str):
        keep_all(channels, node, found)
        return
    operands, results = found
    for letter, cells in operands.items():
        if letter in results:
            channels.couple([*cells, (node.outputs[0], results[letter])], node)
        else:
            channels.couple(cells, node, limit=_zero_terms(channels, cells))


def _zeros(channels: Channels, node: ir.Node) -> Sequence[Zeros] | None:
    found = _cells(channels, node)
    if isinstance(found, str):
        return None
    operands, results = found
    terms = {letter: _zero_terms(channels, cells) for letter, cells in operands.items()}
    everything = any(mask.all() for mask in terms.values()) or any(
        value is not None and channels.zero(value).everything for value in node.inputs
    )
    return [Zeros.of([terms[letter] for letter in results], everything=everything)]


RULES: Mapping[str, Rule] = MappingProxyType({"Einsum": Rule(_agree, _zeros, data=2**10)})

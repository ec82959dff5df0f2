"""How every operator treats channels: one file per operator family, one rule per operator.

Operators: the ONNX standard, docs/Operators.md, opsets 13 to 24. An operator without a rule keeps all its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from cpcompile.passes.channel_rules import (
    attention,
    channel_norms,
    convolutions,
    einsum,
    elementwise,
    pad,
    parts,
    products,
    quantization,
    reductions,
    reshapes,
    subgraphs,
    whole_axes,
)
from cpcompile.passes.channel_rules.rule import Rule
from cpcompile.passes.operators import is_standard

FAMILIES = (
    *(elementwise, products, einsum, quantization, attention, convolutions, channel_norms, whole_axes, reductions),
    *(reshapes, parts, pad, subgraphs),
)

RULES: Mapping[str, Rule] = MappingProxyType(
    {operator: rule for family in FAMILIES for operator, rule in family.RULES.items()}
)
"""Operator -> rule."""


def rule_of(node: ir.Node) -> Rule | None:
    """The rule of `node`; None for other domains (functions included) and for operators without a rule."""
    return RULES.get(node.op_type) if is_standard(node) else None

"""What a build will take, said before it starts.

model.pt, model.pt2 -> facts (weights are not read) ┐
a build of a model of one layer -> libraries        ┴ formula -> Estimate -> table, JSON, `check_memory`
"""

from __future__ import annotations

from cpcompile.estimation.facts import Facts, read_facts
from cpcompile.estimation.formula import Estimate, Plan, Stage, estimate
from cpcompile.estimation.libraries import Libraries, measure_libraries
from cpcompile.estimation.limit import check_memory, memory_warning, require_memory
from cpcompile.estimation.table import render_estimate

__all__ = [
    "Estimate",
    "Facts",
    "Libraries",
    "Plan",
    "Stage",
    "check_memory",
    "estimate",
    "measure_libraries",
    "memory_warning",
    "read_facts",
    "render_estimate",
    "require_memory",
]

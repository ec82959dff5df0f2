"""The memory, time and size of a build, estimated before it starts.

model.pt, model.pt2 -> facts (weights are not read) ┐
a build of a model of one layer -> libraries        ┴ formula -> Estimate -> table, JSON, `check_memory`
"""

from __future__ import annotations

from cpcompile.pipeline.estimation.duration import Pace
from cpcompile.pipeline.estimation.facts import Facts, read_facts
from cpcompile.pipeline.estimation.formula import Estimate, RunShape, estimate
from cpcompile.pipeline.estimation.libraries import Libraries, measure_libraries
from cpcompile.pipeline.estimation.limit import check_memory, estimate_build
from cpcompile.pipeline.estimation.table import render_estimate

__all__ = [
    "Estimate",
    "Facts",
    "Libraries",
    "Pace",
    "RunShape",
    "check_memory",
    "estimate",
    "estimate_build",
    "measure_libraries",
    "read_facts",
    "render_estimate",
]

"""Partitioning: any torch module, made ready for contexts.

    trace       torch.export -> a graph of aten operators; every parameter axis gets channel ids
    flow        rules        ids run through the operators, which couple what is removed together   (union-find)
    groups      channels that end at the same consumers form a group; units; what cannot be gated, and why
    experts     routers with the experts that they pick, each a unit
    partition   gates in front of the consumers, proven to change nothing -> PartitionedModule

A channel can be removed when nothing needs it: everything that reads it either goes with it or is a *consumer*, a
contraction with a weight (linear layer, convolution) whose input is multiplied by the gate. So a group is a set of
coupled channels that end in consumers only. The residual stream is no group: a norm over its channels, or an output of
the model, keeps it whole, and it is refused with that reason.

The rules are cautious: a union too many makes units coarser, never wrong; an operator without a rule keeps all that
it reads.
"""

from __future__ import annotations

from cpcompile.partitioning.groups import Consumer, Group, Refused
from cpcompile.partitioning.partitioned_module import PartitionedModule
from cpcompile.partitioning.partitioner import partition

__all__ = ["Consumer", "Group", "PartitionedModule", "Refused", "partition"]

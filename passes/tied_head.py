"""A weight that is both the table of token embeddings and the head, stored as the table, row by row.

    Transpose(Gather(E, ids, axis=1))   ->   Gather(rows, ids)                        rows = E transposed
    MatMul(x, E)                        ->   FusedMatMul(x, rows, transB=1)

Looking up a column takes one element of each row of E, which lie far from each other. The operator of ONNX Runtime
multiplies by rows as fast as by columns, so that neither has to be there twice.

Source: ONNX Runtime, docs/ContribOperators (FusedMatMul).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cpcompile.passes.derived_parameters import Derivation, DerivedParameters
from cpcompile.passes.graph_pass import GraphPass
from cpcompile.passes.share_weights import KeptChannels, Whole

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class TiedHead(GraphPass):
    """Store tied weights row by row; `kept` and `whole` as in `DerivedParameters`."""

    kept: KeptChannels = field(repr=False)
    whole: Mapping[str, Whole] = field(repr=False)

    def call(self, model: ir.Model) -> Derivation:
        """Edit `model`; `modified` says whether it has such a weight."""
        parameters = DerivedParameters(model.graph, self.kept, self.whole)
        heads = {name: node for node, name in parameters.products()}
        for lookup, name in parameters.lookups():
            weight = lookup.node.inputs[0]
            if not lookup.columns or name not in heads or weight is None or len(weight.uses()) != 2:
                continue
            head, shape = heads[name], parameters.shape(name)
            turned = Whole(shape[::-1], partial(_turned, parameters, name))
            rows = parameters.add(f"{name}.rows", parameters.kept(name)[::-1], ir.DataType.FLOAT, turned)
            found = ir.node("Gather", [rows, lookup.node.inputs[1]], name=lookup.node.name)
            parameters.replace(lookup.last, [found], name, first=lookup.node)
            product = ir.node("FusedMatMul", [head.inputs[0], rows], {"transB": 1}, domain=DOMAIN, name=head.name)
            parameters.replace(head, [product], name)
            model.graph.opset_imports[DOMAIN] = 1
        parameters.drop_unread()
        return Derivation(model, bool(parameters.replaced), parameters.derived)


def _turned(parameters: DerivedParameters, name: str) -> npt.NDArray[np.generic]:
    return parameters.read(name).T

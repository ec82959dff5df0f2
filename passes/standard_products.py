"""Products with a transposed matrix in the operators of the standard, for runtimes that know no others.

    FusedMatMul(x, rows, transB=1)  ->  MatMul(x, Transpose(rows))

`tied_head` makes them.

Source: ONNX Runtime, docs/ContribOperators (FusedMatMul).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from cpcompile.passes.graph_pass import GraphPass

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class StandardProducts(GraphPass):
    """Replace every FusedMatMul that only transposes its second operand, a matrix; others stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`."""
        replaced = 0
        for node in list(model.graph):
            rows = node.inputs[1] if _transposes_the_second(node) else None
            if rows is None or rows.shape is None or rows.shape.rank() != 2:
                continue
            props = dict(node.metadata_props)
            turned = ir.node("Transpose", [rows], {"perm": [1, 0]}, name=f"{node.name}.rows", metadata_props=props)
            product = ir.node("MatMul", [node.inputs[0], turned.outputs[0]], name=node.name, metadata_props=props)
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], [turned, product], node.outputs, product.outputs
            )
            replaced += 1
        if replaced and not any(node.domain == DOMAIN for node in model.graph.all_nodes()):
            model.graph.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, bool(replaced))


def _transposes_the_second(node: ir.Node) -> bool:
    """Whether `node` is a FusedMatMul that does nothing else besides the product."""
    if (node.domain, node.op_type) != (DOMAIN, "FusedMatMul"):
        return False
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    return settings.pop("transB", 0) == 1 and settings.pop("alpha", 1.0) == 1.0 and not any(settings.values())

"""What the exporter noted for debugging goes, also in subgraphs; the module that a node came from stays."""

from __future__ import annotations

import onnx_ir as ir

from cpcompile.passes.strip_metadata import MODULE, StripMetadata
from tests.unit.passes.graph_text import canonical, parse

TEXT = """(float[N,4] x, bool c) => (float[N,4] y) {
    h = Relu(x)
    y = If (c) <
        then_branch = a () => (float[N,4] p) { p = Neg(h) }, else_branch = b () => (float[N,4] q) { q = Exp(h) }
    >
}"""


def test_only_the_module_stays() -> None:
    model = parse(TEXT)
    nodes = list(model.graph.all_nodes())
    for node in nodes:
        node.metadata_props.update(
            {MODULE: ": Net/layers.0: Layer/relu: aten.relu", "pkg.torch.onnx.stack_trace": "/home"}
        )
        node.doc_string = "/home/somebody/model.py(12)"
        node.outputs[0].metadata_props["pkg.onnxscript.optimizer.folded_from"] = "[x]"
    model.graph.inputs[0].metadata_props["note"] = "/home"
    model.metadata_props["licence"] = "stays"
    assert StripMetadata()(model).modified
    assert [dict(node.metadata_props) for node in nodes] == [{MODULE: "layers.0"}] * 4
    assert canonical(model) == canonical(parse(TEXT))
    written = str(ir.to_proto(model))
    assert "/home" not in written and "folded_from" not in written and "stays" in written
    assert not StripMetadata()(model).modified

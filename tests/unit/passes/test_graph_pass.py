"""A pass that changes the interface of a model, or what a weight is declared as, is stopped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from cpcompile.passes.graph_pass import GraphPass, InterfaceError
from cpcompile.pipeline.optimize import PASSES
from tests.unit.passes.graph_text import parse

Edit = Callable[[ir.Model], None]


class Wrong(GraphPass):
    """Does to the model what the test says."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model`."""
        self.edit(model)
        return ir.passes.PassResult(model, modified=True)


def change_type(model: ir.Model) -> None:
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)


def change_rank(model: ir.Model) -> None:
    model.graph.outputs[0].shape = ir.Shape(["N"])


def change_name(model: ir.Model) -> None:
    model.graph.outputs[0].name = "z"


def change_weight(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = ir.tensor(np.zeros((4, 2), np.float64))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (change_type, "the output y was y: FLOAT of rank 2 and is y: FLOAT16 of rank 2"),
        (change_rank, "of rank 2 and is y: FLOAT of rank 1"),
        (change_name, "and is z: FLOAT"),
        (change_weight, "the initializer w is declared as FLOAT and holds DOUBLE"),
    ],
)
def test_what_a_pass_must_not_change(edit: Edit, says: str) -> None:
    model = parse("(float[N,4] x) => (float[N,2] y) { y = MatMul(x, w) }", {"w": (4, 2)})
    with pytest.raises(InterfaceError, match=says) as error:
        Wrong(edit)(model)
    assert "after the pass test_graph_pass, " in str(error.value)
    assert "leave the pass out of --passes, and report the model" in str(error.value)


def test_a_model_that_was_wrong_before_is_not_blamed_on_the_pass() -> None:
    model = parse("(float[N,4] x) => (float[N,2] y) { y = MatMul(x, w) }", {"w": (4, 2)})
    change_weight(model)
    assert Wrong(lambda _: None)(model).modified


def test_every_pass_is_checked() -> None:
    """But for the inference of shapes, which corrects what a file claims."""
    unchecked = [name for name, kind in PASSES.items() if not issubclass(kind, GraphPass)]
    assert unchecked == ["infer_shapes"]

import numpy as np
import pytest

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.passes.bind_context import BindContext

GATED = "(float[N,4] x, int64 context) => (float[N,4] y) { g = Gather(table, context) y = Mul(x, g) }"
TABLE = np.arange(12.0).reshape(3, 4)


def test_the_input_becomes_a_constant(graphs):
    before = graphs.build(GATED, table=TABLE)
    after = before.clone()
    assert BindContext(2)(after).modified
    assert [value.name for value in after.graph.inputs] == ["x"]
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(graphs.run(after, {"x": x})["y"], np.tile(TABLE[2].astype(np.float32), (2, 1)))
    graphs.check(after)


def test_a_second_run_finds_no_input(graphs):
    model = graphs.build(GATED, table=TABLE)
    BindContext(0)(model)
    assert not BindContext(0)(model).modified


@pytest.mark.parametrize("context", [-1, 3])
def test_a_row_that_is_not_there_is_refused(graphs, context):
    with pytest.raises(UsageError, match=f"context {context}: table has the contexts 0 to 2"):
        BindContext(context)(graphs.build(GATED, table=TABLE))


@pytest.mark.parametrize("kind", ["float", "int64[2]"])
def test_an_input_of_another_form_is_refused(graphs, kind):
    model = graphs.build(f"({kind} context) => ({kind} y) {{ y = Neg(context) }}")
    with pytest.raises(CpcompileError, match="a context is an integer scalar"):
        BindContext(0)(model)

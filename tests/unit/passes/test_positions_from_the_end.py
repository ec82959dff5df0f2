"""Positions that count from the end would be others once the axis is shorter.

Every graph makes `h`, of which some channels are zero and others are never asked for, and reads it by positions:
indices, bounds, paddings, axes. Whatever is cut, the values stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels
from cpcompile.pipeline.optimize import DEFAULT, apply_pass, parse_pass, prepare
from tests.unit.passes.graph_text import Array, assert_same_values, check, eliminate, tensor

ROWS = 3
CASE = Path("positions.onnx")


def constants_of(model: ir.Model, operator: str, index: int) -> list[object]:
    """What the nodes with this operator read as input `index`."""
    values = [node.inputs[index] for node in model.graph if node.op_type == operator]
    return [v.const_value.numpy().tolist() for v in values if v is not None and v.const_value is not None]


def test_a_negative_index_names_the_same_row_of_a_shorter_axis() -> None:
    """Nothing asks for the last of five channels. The positive numbers stay as they are, -2 now is the last."""
    text = """(float[N,4] x) => (float[N] p, float[N] q, float[N,2] r, float[N,1,2] s) {
        h = MatMul(x, w)
        p = Gather <axis = 1> (h, second_to_last) q = Gather <axis = -1> (h, first)
        r = Gather <axis = -1> (h, two) s = Gather <axis = 1> (h, matrix) }"""
    indices = {
        "second_to_last": np.array(-2),
        "first": np.array(0),
        "two": np.array([2, -4]),
        "matrix": np.array([[-5, -3]]),
    }
    result = eliminate(text, {"w": (4, 5), **indices})
    assert tensor(result.model, "w").shape == (4, 4)
    assert constants_of(result.model, "Gather", 1) == [3, 0, [2, 1], [[0, 2]]]


def test_bounds_of_an_empty_slice_stay_empty() -> None:
    """[-1:2] of four channels is empty; of two channels it would be one."""
    text = """(float[N,4] x) => (float[N,1] p, float[N,M] q) {
        h = MatMul(x, w) p = Slice(h, zero, one, one) q = Slice(h, end, two, one) }"""
    bounds = {"zero": np.array([0]), "one": np.array([1]), "end": np.array([-1]), "two": np.array([2])}
    result = eliminate(text, {"w": (4, 4), **bounds})
    assert tensor(result.model, "w").shape == (4, 1)


@pytest.mark.parametrize(
    ("text", "operators"),
    [
        ("u = Unsqueeze(z, last) s = Squeeze(u)", ["MatMul", "Unsqueeze", "Squeeze", "MatMul"]),
        ("s = Squeeze(z)", ["MatMul", "MatMul"]),
        ("u = Unsqueeze(z, last) s = Squeeze(u, last)", ["MatMul", "Unsqueeze", "Squeeze", "MatMul"]),
    ],
)
def test_a_squeeze_drops_no_axis_of_which_one_channel_is_left(text: str, operators: Sequence[str]) -> None:
    text = f"(float[3,4] x) => (float[3,2] y) {{ h = MatMul(x, w) z = Mul(h, g) {text} y = MatMul(s, v) }}"
    weights = {"w": (4, 6), "g": np.eye(6)[2], "v": (6, 2), "last": np.array([-1])}
    result = eliminate(text, {name: weight for name, weight in weights.items() if f"{name})" in text})
    assert tensor(result.model, "w").shape == (4, 1)
    assert [node.op_type for node in result.model.graph] == operators


def test_a_slice_of_two_axes_that_bounds_cannot_express() -> None:
    """Every second of eight rows and columns, of which the fourth is gone, but not what lies between the others."""
    text = """(float[N,4] x) => (float[N,2] y, float[N,2] z) {
        h = MatMul(x, w) r = Reshape(h, grid) a = Mul(r, rows) b = Mul(a, columns)
        s = Slice(b, starts, ends, axes, steps) f = Reshape(s, part) y = MatMul(f, v)
        k = Reshape(b, whole) z = MatMul(k, u) }"""
    gate = np.array([1, 2, 1, 0, 2, 1, 3, 1.0])
    settings = {"grid": [0, 8, 8], "starts": [-8, -8], "ends": [-1, 9], "axes": [-2, -1], "steps": [2, 2]}
    weights = {name: np.array(numbers) for name, numbers in {**settings, "part": [0, 16], "whole": [0, 64]}.items()}
    gates = {"rows": gate[:, None], "columns": gate}
    result = eliminate(text, {"w": (4, 64), "v": (16, 2), "u": (64, 2), **weights, **gates})
    assert [node.op_type for node in result.model.graph].count("Gather") == 2


Kind = Callable[["Graph"], None]


class Graph:
    """A random graph on `h` (rows, channels), and the outputs that read it by positions."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.channels = int(self.rng.integers(3, 9))
        self.nodes: list[object] = []
        self.arrays: dict[str, Array] = {}
        self.outputs: list[str] = []
        weight = self.rng.standard_normal((4, self.channels))
        gate = np.where(self.rng.random(self.channels) < 0.4, 0, self.rng.uniform(1, 2, self.channels))
        gate[self.rng.integers(self.channels)] = 1.5  # something has to be left
        self.h = self.node("Mul", self.node("MatMul", "x", self.constant(weight)), self.constant(gate))

    def constant(self, array: object) -> str:
        name, given = f"c{len(self.arrays)}", np.asarray(array)
        self.arrays[name] = given.astype(np.float32) if given.dtype == np.float64 else given
        return name

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        names = [f"v{len(self.nodes)}.{at}" for at in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names[0]

    def position(self, length: int, size: int | tuple[int, ...] | None = None) -> Array:
        return np.asarray(self.rng.integers(-length, length, size), dtype=np.int64)

    def axis(self) -> int:
        """The axis of the channels."""
        return int(self.rng.choice([-1, 1]))

    def then(self, value: str, width: int) -> None:
        """Ask for some of what was read, through a product that may drop zeros."""
        if self.rng.random() < 0.5:
            value = self.node("MatMul", value, self.constant(self.rng.standard_normal((width, 2))))
        self.outputs.append(value)

    def model(self, rows: int | str) -> ir.Model:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 4])
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs]
        constants = [numpy_helper.from_array(array, name) for name, array in self.arrays.items()]
        graph = helper.make_graph(self.nodes, "g", [x], outputs, constants)
        model = ir.from_proto(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]))
        prepare(model, CASE)
        return model


def gather(g: Graph) -> None:
    shape = [(), (3,), (1, 2)][g.rng.integers(3)]
    picked = g.node("Gather", g.h, g.constant(g.position(g.channels, shape)), axis=g.axis())
    g.outputs.append(picked) if len(shape) != 1 else g.then(picked, 3)


def window(g: Graph) -> None:
    start, end = (int(bound) for bound in g.rng.integers(-g.channels - 1, g.channels + 2, 2))
    step = int(g.rng.choice([1, 2, 3, -1, -2]))
    start = max(start, -g.channels)  # a start beyond the beginning is clamped or not, depending on the engine
    width = len(range(g.channels)[start:end:step])
    values = (g.constant(np.array([number])) for number in (start, end, g.axis(), step))
    g.then(g.node("Slice", g.h, *values), width)


def split(g: Graph) -> None:
    first = int(g.rng.integers(1, g.channels))
    sizes = g.constant(np.array([first, g.channels - first]))
    part = g.node("Split", g.h, sizes, outputs=2, axis=g.axis())
    g.then(*((part, first) if g.rng.random() < 0.5 else (part.replace(".0", ".1"), g.channels - first)))


def pad(g: Graph) -> None:
    before, after = (int(n) for n in g.rng.integers(-1, 3, 2))
    pads, number = g.constant(np.array([before, after])), g.constant(np.float32(g.rng.choice([0, 1])))
    g.then(g.node("Pad", g.h, pads, number, g.constant(np.array([g.axis()]))), g.channels + before + after)


def elements(g: Graph) -> None:
    picked = g.constant(g.position(g.channels, (ROWS, 2)))
    g.outputs.append(g.node("GatherElements", g.h, picked, axis=g.axis()))


def by_rows(g: Graph) -> None:
    picked = g.constant(np.stack([g.position(ROWS, 4), g.position(g.channels, 4)], axis=-1))
    g.outputs.append(g.node("GatherND", g.h, picked))


def scatter(g: Graph) -> None:
    at = np.stack([g.rng.permutation(g.channels)[:2] - g.channels * int(g.rng.integers(2)) for _ in range(ROWS)])
    updates = g.constant(g.rng.standard_normal((ROWS, 2)))
    g.then(g.node("ScatterElements", g.h, g.constant(at), updates, axis=g.axis()), g.channels)


def scatter_rows(g: Graph) -> None:
    at = np.array([[int(g.rng.integers(-ROWS, ROWS)), -1], [0, 0]])[: int(g.rng.integers(1, 3))]
    g.then(g.node("ScatterND", g.h, g.constant(at), g.constant(g.rng.standard_normal(len(at)))), g.channels)


def one_hot(g: Graph) -> None:
    at, depth = g.constant(g.position(g.channels, ROWS)), g.constant(np.array(g.channels))
    marks = g.node("OneHot", at, depth, g.constant(np.array([0.0, 2.0])), axis=-1)
    g.then(g.node("Mul", g.h, marks), g.channels)


def along(g: Graph) -> None:
    """Operators with an axis."""
    axis, kind = g.axis(), int(g.rng.integers(6))
    if kind == 0:
        g.then(g.node("CumSum", g.h, g.constant(np.array(axis))), g.channels)
    elif kind == 1:
        g.then(g.node("Softmax", g.h, axis=axis), g.channels)
    elif kind == 2:
        g.outputs.append(g.node("ReduceSum", g.h, g.constant(np.array([axis]))))
    elif kind == 3:
        g.then(g.node("Concat", g.h, g.h, axis=axis), 2 * g.channels)
    elif kind == 4:
        g.then(g.node("Flatten", g.h, axis=axis), g.channels)
    else:
        column = g.node("Unsqueeze", g.h, g.constant(np.array([axis])))
        g.then(g.node("Squeeze", column, g.constant(np.array([axis]))), g.channels)


def largest(g: Graph) -> None:
    g.outputs.append(g.node("TopK", g.h, g.constant(np.array([2])), outputs=2, axis=g.axis()))


KINDS: Sequence[Kind] = (
    *(gather, window, split, pad, elements, by_rows, scatter, scatter_rows, one_hot, along, largest),
)


RANDOM = (st.integers(0, 2**31), st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), st.booleans())
AS_DRAWN = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def assert_positions_stay(seed: int, kinds: list[Kind], dynamic: bool) -> None:
    graph = Graph(seed)
    for kind in kinds:
        kind(graph)
    before = graph.model("N" if dynamic else ROWS)
    feeds = {"x": graph.rng.standard_normal((ROWS, 4)).astype(np.float32)}
    for names in (["eliminate_dead_channels"], ["remove_empty_layers", "fold_gates", *DEFAULT]):
        after = before.clone()
        for name in names:
            apply_pass(parse_pass(name), after, CASE, name)
        check(after)
        assert_same_values(before, after, feeds, tolerance=1e-5)
        assert not EliminateDeadChannels()(after).modified


@settings(max_examples=15, **AS_DRAWN)
@given(*RANDOM)
def test_positions_from_the_end_stay_what_they_are(seed: int, kinds: list[Kind], dynamic: bool) -> None:
    assert_positions_stay(seed, kinds, dynamic)


@pytest.mark.slow
@settings(max_examples=500, **AS_DRAWN)
@given(*RANDOM)
def test_positions_from_the_end_stay_what_they_are_in_many_graphs(seed: int, kinds: list[Kind], dynamic: bool) -> None:
    assert_positions_stay(seed, kinds, dynamic)

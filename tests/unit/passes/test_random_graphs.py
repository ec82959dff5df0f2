"""Random graphs with random dead channels: values stay, nothing is left that could go, and once is enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cpcompile.passes.eliminate_dead_channels import EliminateDeadChannels, find_channels
from cpcompile.passes.nodes import post_order
from cpcompile.pipeline.optimize import DEFAULT, parse_pass, prepare

WIDTH = 12
TOLERANCE = 1e-6
"""Relative to the largest output; sums lose only terms that are exactly zero."""


@dataclass
class _Writer:
    """Writes a graph on (batch, sequence, channels), one random block after the other."""

    rng: np.random.Generator
    lines: list[str] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    count: int = 0

    def add(self, operation: str) -> str:
        self.count += 1
        self.lines.append(f"v{self.count} = {operation}")
        return f"v{self.count}"

    def constant(self, array: np.ndarray) -> str:
        self.count += 1
        self.arrays[f"c{self.count}"] = array
        return f"c{self.count}"

    def weight(self, *shape: int) -> str:
        return self.constant(self.rng.normal(size=shape) / shape[0] ** 0.5)

    def gate(self, shape: tuple[int, ...]) -> str:
        return self.constant(self.rng.uniform(0.5, 1.5, shape) * (self.rng.random(shape) < 0.6))

    def body(self, x: str, *, loops: bool) -> str:
        """A sub-graph on the 8 channels of `x`, which it reads from outside, and those of its state if it loops."""
        outside, self.lines = self.lines, []
        self.count += 1
        state = f"s{self.count}"
        h = self.add(f"Mul({x}, {self.gate((8,))})")
        h = self.add(f"MatMul({h}, {self.weight(8, 6)})")
        h = self.add(f"Mul({h}, {self.gate((6,))})")
        h = self.add(f"MatMul({h}, {self.weight(6, 8)})")
        dead = self.add(f"Mul({h}, {self.constant(np.zeros(8))})")
        h = self.add(f"Add({h}, {dead})")
        if loops:
            h = self.add(f"Add({h}, {state})")
        inside, self.lines = self.lines, outside
        out = f"float[B,S,8] {h}"
        if not loops:
            return f"g{self.count} () => ({out}) {{ {' '.join(inside)} }}"
        arguments = f"int64 i{self.count}, bool go{self.count}, float[B,S,8] {state}"
        inside.append(f"on{self.count} = Identity(go{self.count})")
        return f"g{self.count} ({arguments}) => (bool on{self.count}, {out}) {{ {' '.join(inside)} }}"

    def block(self, kind: str, x: str) -> str:
        """A block from 12 channels to 12 channels."""
        numbers = np.array
        if kind == "mlp":
            hidden = int(self.rng.choice([6, 8, 16]))
            h = self.add(f"MatMul({x}, {self.weight(WIDTH, hidden)})")
            h = self.add(f"{self.rng.choice(['Relu', 'Tanh', 'Sigmoid', 'Neg', 'Cos'])}({h})")
            h = self.add(f"Mul({h}, {self.gate((hidden,))})")
            if self.rng.random() < 0.3:
                h = self.add(f"{self.rng.choice(['Tanh', 'Sigmoid', 'Abs'])}({h})")
            d = self.add(f"MatMul({h}, {self.weight(hidden, WIDTH)})")
            return self.add(f"Add({x}, {d})") if self.rng.random() < 0.7 else d
        if kind == "heads":
            heads = int(self.rng.choice([2, 3, 4]))
            split, merge = numbers([0, 0, heads, WIDTH // heads]), numbers([0, 0, WIDTH])
            h = self.add(f"MatMul({x}, {self.weight(WIDTH, WIDTH)})")
            h = self.add(f"Reshape({h}, {self.constant(split)})")
            h = self.add(f"Transpose <perm = [0, 2, 1, 3]> ({h})")
            if self.rng.random() < 0.5:
                t = self.add(f"Transpose <perm = [0, 1, 3, 2]> ({h})")
                scores = self.add(f"MatMul({h}, {t})")
                weights = self.add(f"Softmax <axis = -1> ({scores})")
                h = self.add(f"MatMul({weights}, {h})")
            shape = (heads, 1, 1) if self.rng.random() < 0.6 else (heads, 1, WIDTH // heads)
            h = self.add(f"Mul({h}, {self.gate(shape)})")
            h = self.add(f"Transpose <perm = [0, 2, 1, 3]> ({h})")
            h = self.add(f"Reshape({h}, {self.constant(merge)})")
            return self.add(f"MatMul({h}, {self.weight(WIDTH, WIDTH)})")
        if kind == "fused":
            h = self.add(f"MatMul({x}, {self.weight(WIDTH, 16)})")
            self.count += 2
            p, q = f"v{self.count - 1}", f"v{self.count}"
            self.lines.append(f"{p}, {q} = Split <axis = 2, num_outputs = 2> ({h})")
            s = self.add(f"Sigmoid({p})")
            h = self.add(f"Mul({s}, {q})")
            h = self.add(f"Mul({h}, {self.gate((8,))})")
            return self.add(f"MatMul({h}, {self.weight(8, WIDTH)})")
        if kind == "concat":
            parts = [self.add(f"MatMul({x}, {self.weight(WIDTH, n)})") for n in (4, 6)]
            h = self.add(f"Concat <axis = 2> ({', '.join(parts)})")
            h = self.add(f"Mul({h}, {self.gate((10,))})")
            return self.add(f"MatMul({h}, {self.weight(10, WIDTH)})")
        if kind == "slice":
            start, end = self.constant(numbers([2])), self.constant(numbers([9]))
            h = self.add(f"Slice({x}, {start}, {end}, {self.constant(numbers([2]))})")
            h = self.add(f"Mul({h}, {self.gate((7,))})")
            return self.add(f"MatMul({h}, {self.weight(7, WIDTH)})")
        if kind == "gather":
            picked = self.constant(self.rng.integers(0, WIDTH, 9))
            h = self.add(f"Gather <axis = 2> ({x}, {picked})")
            h = self.add(f"Mul({h}, {self.gate((9,))})")
            return self.add(f"MatMul({h}, {self.weight(9, WIDTH)})")
        if kind == "repeat":
            h = self.add(f"MatMul({x}, {self.weight(WIDTH, 6)})")
            h = self.add(f"Reshape({h}, {self.constant(numbers([0, 0, 3, 1, 2]))})")
            h = self.add(f"Expand({h}, {self.constant(numbers([1, 1, 3, 2, 2]))})")
            h = self.add(f"Reshape({h}, {self.constant(numbers([0, 0, 12]))})")
            h = self.add(f"Mul({h}, {self.gate((12,))})")
            return self.add(f"MatMul({h}, {self.weight(12, WIDTH)})")
        if kind == "steps":
            bounds = self.rng.choice([[0, 12, 2], [1, 99, 3], [-1, -13, -1], [10, 0, -4], [4, 5, 1]])
            start, end, step = (self.constant(numbers([n])) for n in bounds)
            h = self.add(f"MatMul({x}, {self.weight(WIDTH, WIDTH)})")
            other = self.add(f"Slice({h}, {start}, {end}, {self.constant(numbers([2]))}, {step})")
            width = len(range(12)[slice(*bounds.tolist())])
            other = self.add(f"MatMul({other}, {self.weight(width, WIDTH)})")
            h = self.add(f"Mul({h}, {self.gate((WIDTH,))})")
            h = self.add(f"MatMul({h}, {self.weight(WIDTH, WIDTH)})")
            return self.add(f"Add({h}, {other})")
        if kind == "pad":
            pads, number = self.constant(numbers([2, 1])), self.constant(np.array(self.rng.choice([0.0, 1.0])))
            h = self.add(f"MatMul({x}, {self.weight(WIDTH, 7)})")
            h = self.add(f"Mul({h}, {self.gate((7,))})")
            h = self.add(f"Pad({h}, {pads}, {number}, {self.constant(numbers([-1]))})")
            h = self.add(f"Mul({h}, {self.gate((10,))})")
            return self.add(f"MatMul({h}, {self.weight(10, WIDTH)})")
        if kind == "einsum":
            h = self.add(f'Einsum <equation = "bsc,hcd->bhsd"> ({x}, {self.weight(3, WIDTH, 4)})')
            h = self.add(f"Mul({h}, {self.gate((3, 1, 1))})")
            h = self.add(f"Mul({h}, {self.gate((4,))})")
            return self.add(f'Einsum <equation = "bhsd, hdc -> bsc"> ({h}, {self.weight(3, 4, WIDTH)})')
        if kind == "attention":
            q = self.add(f"MatMul({x}, {self.weight(WIDTH, 16)})")
            k, v = (self.add(f"MatMul({x}, {self.weight(WIDTH, 8)})") for _ in "kv")
            angles = self.rng.normal(size=(8, 1))
            cos, sin, at = (self.constant(array) for array in (np.cos(angles), np.sin(angles), numbers([[0]])))
            at = self.add(f"Expand({at}, {self.add(f'Shape <start = 0, end = 2> ({x})')})")
            q = self.add(f"RotaryEmbedding <num_heads = 8> ({q}, {cos}, {sin}, {at})")
            h = self.add(f"Attention <q_num_heads = 8, kv_num_heads = 4> ({q}, {k}, {v})")
            h = self.add(f"Mul({h}, {self.constant(np.repeat(self.rng.random(8) < 0.4, 2) * 1.5)})")
            return self.add(f"MatMul({h}, {self.weight(16, WIDTH)})")
        if kind == "convolutions":
            groups, others = (int(n) for n in self.rng.choice([1, 2, 3, 4, 6], 2))
            h = self.add(f"Transpose <perm = [0, 2, 1]> ({x})")
            h = self.add(f"Conv ({h}, {self.weight(WIDTH, WIDTH, 1)})")
            h = self.add(f"Mul({h}, {self.gate((WIDTH, 1))})")
            w, v = self.weight(2 * WIDTH, WIDTH // groups, 1), self.weight(2 * WIDTH, WIDTH // others, 1)
            h = self.add(f"Conv <group = {groups}> ({h}, {w})")
            if self.rng.random() < 0.7:
                scale, bias = self.weight(2 * WIDTH), self.gate((2 * WIDTH,))
                norm = self.rng.choice(["GroupNormalization <num_groups = 8>", "InstanceNormalization"])
                h = self.add(f"{norm} ({h}, {scale}, {bias})")
            h = self.add(f"Mul({h}, {self.gate((2 * WIDTH, 1)) if groups != 3 else self.gate((1, 1))})")
            h = self.add(f"ConvTranspose <group = {others}> ({h}, {v}, {self.gate((WIDTH,))})")
            h = self.add(f"Mul({h}, {self.gate((WIDTH, 1))})")
            h = self.add(f"Conv ({h}, {self.weight(WIDTH, WIDTH, 1)})")
            return self.add(f"Transpose <perm = [0, 2, 1]> ({h})")
        if kind == "quantized":
            weight, point = self.rng.integers(-9, 9, (WIDTH, 8)), self.rng.integers(-3, 3, 8)
            weight[:, self.rng.random(8) < 0.4] = 0
            scales = [self.constant(self.rng.uniform(0.05, 0.1, n)) for n in (8, 1)]
            w = self.add(f"DequantizeLinear <axis = 1> ({self.constant(weight.astype(np.int8))}, {scales[0]})")
            h = self.add(f"MatMul({x}, {w})")
            h = self.add(f"Mul({h}, {self.gate((8,))})")
            zero = self.constant(point.astype(np.int8))
            q = self.add(f"QuantizeLinear <axis = 2> ({h}, {scales[0]}, {zero})")
            h = self.add(f"DequantizeLinear <axis = 2> ({q}, {scales[0]}, {zero})")
            return self.add(f"MatMul({h}, {self.weight(8, WIDTH)})")
        if kind in ("if", "loop"):
            h = self.add(f"MatMul({x}, {self.weight(WIDTH, 8)})")
            z = self.add(f"Mul({h}, {self.gate((8,))})")
            subgraphs = [self.body(z, loops=kind == "loop") for _ in range(1 if kind == "loop" else 2)]
            if kind == "if":
                h = self.add(f"If (c) <then_branch = {subgraphs[0]}, else_branch = {subgraphs[1]}>")
            else:
                h = self.add(f"Loop ({self.constant(np.array(2))}, , {h}) <body = {subgraphs[0]}>")
            h = self.add(f"Mul({h}, {self.gate((8,))})")
            return self.add(f"MatMul({h}, {self.weight(8, WIDTH)})")
        if kind == "bias":
            h = self.add(f"MatMul({x}, {self.constant(np.zeros((WIDTH, 5)))})")
            h = self.add(f"MatMul({h}, {self.weight(5, WIDTH)})")
            h = self.add(f"Add({h}, {self.weight(WIDTH)})")
            if self.rng.random() < 0.5:
                h = self.add(f"Mul({self.gate((WIDTH,))}, {h})")
            return self.add(f"Add({x}, {h})") if self.rng.random() < 0.7 else h
        if kind == "joined":
            h = self.add(f"MatMul({x}, {self.weight(WIDTH, 6)})")
            dead = self.add(f"Mul({h}, {self.constant(np.zeros(6))})")
            parts = self.rng.permutation([dead, h, dead])
            joined = self.add(f"Concat <axis = 2> ({', '.join(parts)})")
            joined = self.add(f"MatMul({joined}, {self.weight(18, WIDTH)})")
            other = self.add(f"MatMul({self.add(f'Cos({dead})')}, {self.weight(6, WIDTH)})")
            return self.add(f"Add({joined}, {other})")
        if kind == "norm":
            return self.add(f"LayerNormalization({x}, {self.weight(WIDTH)}, {self.weight(WIDTH)})")
        if kind == "sum":
            h = self.add(f"Mul({x}, {self.gate((WIDTH,))})")
            h = self.add(f"ReduceSum ({h}, {self.constant(numbers([2]))})")
            return self.add(f"Add({x}, {h})")
        assert kind == "dead"
        h = self.add(f"MatMul({x}, {self.weight(WIDTH, 5)})")
        h = self.add(f"Mul({h}, {self.constant(np.zeros(5))})")
        h = self.add(f"MatMul({h}, {self.weight(5, WIDTH)})")
        return self.add(f"Add({h}, {x})")


BLOCKS = [
    *("mlp", "heads", "fused", "concat", "slice", "gather", "repeat", "norm", "sum", "dead", "steps", "pad"),
    *("einsum", "attention", "convolutions", "quantized", "if", "loop", "bias", "joined"),
]


def _random_graph(graphs, seed: int, blocks: list[str], two_outputs: bool) -> ir.Model:
    """`blocks` one after the other; with two outputs what lies between them is asked for, too."""
    writer = _Writer(np.random.default_rng(seed))
    current, seen = "x", []
    for kind in blocks:
        current = writer.block(kind, current)
        seen.append(current)
    writer.lines.append(f"y = MatMul({current}, {writer.weight(WIDTH, 5)})")
    outputs = "float[B,S,5] y"
    if two_outputs:
        outputs += ", float[B,S,12] z"
        writer.lines.append(f"z = Neg({seen[len(seen) // 2]})")
    text = f"(float[B,S,12] x, bool c) => ({outputs}) {{ {chr(10).join(writer.lines)} }}"
    return graphs.build(text, opset=23, **writer.arrays)


def _assert_same(graphs, before: ir.Model, after: ir.Model, tolerance: float) -> None:
    for rows, columns in ((1, 1), (2, 3)):
        x = np.random.default_rng(rows).normal(size=(rows, columns, WIDTH)).astype(np.float32)
        graphs.assert_same(before, after, {"x": x, "c": np.array(rows > 1)}, tolerance)


def _unexplained(model: ir.Model) -> list[str]:
    """Sums that still add up a zero for which the table has no reason; a sum of nothing but zeros keeps one."""
    channels = find_channels(model.graph)
    left = []
    for node in post_order(model.graph):
        if node.op_type == "MatMul":
            first, second = node.inputs
            at = len(channels.shape(first)) - 1, max(len(channels.shape(second)) - 2, 0)
            mask = channels.zero(first).axes[at[0]] | channels.zero(second).axes[at[1]]
            reasons = channels.reasons((first, at[0])), channels.reasons((second, at[1]))
            if not mask.all() and any(reason is None for own in reasons for reason in own[mask]):
                left.append(node.outputs[0].name)
    return left


RANDOM_GRAPHS = (st.integers(0, 2**31), st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5), st.booleans())
AS_DRAWN = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=20, **AS_DRAWN)
@given(*RANDOM_GRAPHS)
@example(0, BLOCKS, False)
@example(1, ["dead"], False)
@example(2, ["heads", "repeat", "heads"], True)
@example(3, ["bias", "joined"], True)
def test_values_stay_and_zeros_go_or_are_explained(graphs, seed, blocks, two_outputs):
    before = _random_graph(graphs, seed, blocks, two_outputs)
    after, twin = before.clone(), before.clone()

    result = EliminateDeadChannels()(after)
    graphs.check(after)
    _assert_same(graphs, before, after, TOLERANCE)
    for name, axes in result.kept.items():
        array = before.graph.initializers[name.partition(".")[0]].const_value.numpy()
        for axis, channels in enumerate(axes):
            array = array if channels is None else array.take(channels, axis=axis)
        np.testing.assert_array_equal(after.graph.initializers[name].const_value.numpy(), array)

    removable = [(value.name, axis) for (value, axis), mask in find_channels(after.graph).cells if mask.any()]
    assert not removable
    assert not _unexplained(after)
    again = EliminateDeadChannels()(after)
    assert not again.modified
    assert again.blocked == result.blocked
    EliminateDeadChannels()(twin)
    assert ir.to_proto(twin).SerializeToString() == ir.to_proto(after).SerializeToString()


@settings(max_examples=10, **AS_DRAWN)
@given(*RANDOM_GRAPHS)
@example(4, BLOCKS, True)
def test_all_passes_of_opt_keep_values_and_each_comes_to_an_end(graphs, seed, blocks, two_outputs):
    before = _random_graph(graphs, seed, blocks, two_outputs)
    after = before.clone()
    prepare(after, Path("random.onnx"))
    for name in ("remove_empty_layers", "fold_gates", "transpose_parameters", *DEFAULT, "fold_gates"):
        each = parse_pass(name)
        each(after)
        assert not each(after).modified, name
        _assert_same(graphs, before, after, 20 * TOLERANCE)  # folded gates round elsewhere
    graphs.check(after)

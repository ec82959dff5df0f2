"""Whole random graphs: blocks one after the other, outputs, and what a file may claim about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from tests.fuzz.blocks import ANYWHERE, STYLES
from tests.fuzz.random_graphs import Array, RejectedError, Writer, info_of, session_of

OPSETS, IR_VERSIONS = range(13, 25), range(3, 13)
LEAST, ATTEMPTS = 30, 400
"""Nodes of a graph, and blocks that are tried for them."""
LIES = 0.4
"""Part of the graphs in which values have wrong shapes."""
LOUD = 20.0
"""Larger numbers are made smaller, so that rounding stays what it is."""


@dataclass(frozen=True)
class RandomGraph:
    """A model and two sets of inputs that it takes."""

    model: onnx.ModelProto
    feeds: tuple[Mapping[str, Array], ...]
    contexts: int
    """Rows of the gates that its input `region` picks from; 0 if it has no such input."""


def random_graph(seed: int) -> RandomGraph:
    """The graph of `seed`, always the same."""
    rng = np.random.default_rng(seed)
    g = Writer(rng, opset=int(rng.choice(OPSETS)))
    style = g.pick(list(STYLES))
    rank = 4 if style == "vision" or (style == "detection" and g.chance(0.3)) else 3
    shape = (2, *((g.number(3, 8),) * (rank == 4)), g.number(4, 8), g.number(3, 8))
    g.values["x"] = rng.standard_normal(shape).astype(np.float32)
    g.values["on"] = np.array(g.chance(0.5))
    g.pool.append("x")
    contexts = g.number(2, 4) if g.chance(0.2) else 0
    if contexts:
        g.values["region"] = np.array(g.number(0, contexts - 1))
        _context_gate(g, contexts)
    length = LEAST + g.number(0, 25)
    for _ in range(ATTEMPTS):
        if len(g.nodes) >= length:
            break
        block = g.pick(list((STYLES[style] if g.chance(0.6) else ANYWHERE).values()))
        before = len(g.nodes)
        try:
            found = block(g, g.pick(g.pool[-4:] if g.chance(0.8) else g.pool))
            for name in [found] if isinstance(found, str) else found:
                loud = np.abs(g.values[name]).max(initial=0) > LOUD
                g.pool.append(g.op("Mul", name, g.const(np.float32(0.05))) if loud else name)
        except (RejectedError, ValueError, IndexError):  # the last two: numpy has nothing to choose from
            if g.chance(0.7):  # sometimes what nobody reads stays
                del g.nodes[before:]
    return _finished(g, contexts)


def _context_gate(g: Writer, contexts: int) -> None:
    width, hidden = g.shape("x")[-1], g.pick([4, 8])
    table = g.const(np.where(g.rng.random((contexts, hidden)) < 0.5, 0, 1.5))
    h = g.op("MatMul", "x", g.weight(width, hidden))
    h = g.op("Mul", h, g.op("Gather", table, "region"))
    g.pool.append(g.op("MatMul", h, g.weight(hidden, width)))


def _finished(g: Writer, contexts: int) -> RandomGraph:
    """Some values become outputs; the interface gets symbolic axes, and values get shapes, true or not."""
    made = {name: node for node in g.nodes for name in node.output}
    read = {name for node in g.nodes for name in node.input}
    leaves = [name for name in g.pool if name in made and name not in read] or [g.pool[-1]]
    some = leaves if g.chance(0.7) else [g.pick(leaves) for _ in range(3)]
    outputs = list(dict.fromkeys([leaves[-1], *some]))
    if g.chance(0.2):
        outputs = list(dict.fromkeys([*outputs, g.pick(g.pool[1:] or g.pool)]))
    outputs = [g.op("Identity", name) if name not in made else name for name in outputs]
    ir_version = int(g.rng.choice(IR_VERSIONS))
    defaults = g.initializers if ir_version < 4 else [n for n in g.initializers if g.chance(0.05)]
    needed = {name for node in g.nodes for name in _reads(node)}
    inputs = [name for name in ("x", "ids", "on", "region") if name in needed or name == "x"]
    symbolic = g.number(0, 2)

    def shape(name: str) -> list[object]:
        dims: list[object] = list(g.shape(name))
        if symbolic and dims and name not in ("on", "region"):
            dims[0] = "N"
        return [f"{name}_{i}" for i in range(len(dims))] if symbolic == 2 and g.chance(0.3) else dims

    interface = [info_of(name, g.values[name], shape(name)) for name in inputs]
    results = [info_of(name, g.values[name], [None] * len(g.shape(name))) for name in outputs]
    weights = [info_of(name, g.values[name], shape(name) if g.chance(0.5) else None) for name in defaults]
    claims = [info_of(name, g.values[name]) for name in made if g.chance(0.3)] if g.chance(0.4) else []
    lies = [_lie(g, name) for name in made if g.chance(0.1)] if g.chance(LIES) else []
    feeds = {name: g.values[name] for name in inputs}
    others = dict(feeds) | {"x": g.rng.standard_normal(g.shape("x")).astype(np.float32)}
    others |= {"on": np.asarray(~feeds["on"])} if "on" in feeds else {}
    for given, known in ((weights, [*claims, *lies]), (weights, claims), ([], [])):
        graph = helper.make_graph(
            [*g.nodes], "random", [*interface, *given], results, [*g.initializers.values()], value_info=known
        )
        opset = helper.make_opsetid("ai.onnx" if g.chance(0.1) else "", g.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=ir_version if given else max(ir_version, 4))
        try:  # what a file claims may be more than ONNX Runtime takes
            session = session_of(model)
            for each in (feeds, others):
                session.run(None, each)
        except Exception as error:  # it has no common error class
            refusal = str(error)
            continue
        return RandomGraph(model, (feeds, others), contexts if "region" in feeds else 0)
    raise RejectedError(f"the graph as a whole: {refusal}")


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, also in its subgraphs."""
    inside = [each for attribute in node.attribute for each in attribute.g.node]
    return set(node.input).union(*map(_reads, inside)) if inside else set(node.input)


def _lie(g: Writer, name: str) -> onnx.ValueInfoProto:
    """Another shape than the value has: another length, another rank."""
    shape: list[object] = list(g.shape(name))
    if shape and g.chance(0.7):
        shape[g.number(0, len(shape) - 1)] = g.number(1, 9)
    else:
        shape = shape[1:] if g.chance(0.5) else [1, *shape]
    return info_of(name, g.values[name], shape)

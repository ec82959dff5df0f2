"""Mixtures of experts in an exported graph: a router that picks k of E experts, and weights stacked by expert.

    logits = linear(x, router)                      (.., E)
    scores, numbers = topk(softmax(logits), k)      the softmax before or after
    experts(x, numbers, weights)                    a module that reads stacked[numbers] of its parameters (E, ..)

An expert is a unit: its slice of every stacked parameter and its row of the router. Experts can be gated if only topk
reads the logits, and their numbers are used only to look up these parameters; otherwise the refusal says why not.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

from cpcompile.core.selection import UnitKind
from cpcompile.partitioning.flow import module_path, place
from cpcompile.partitioning.groups import Consumer, Found, Group, IntArray, Refused, common_name, inputs_of
from cpcompile.partitioning.trace import Traced

_PASS_ON = {"to", "_to_copy", "type_as", "clone", "contiguous", "detach", "view", "reshape", "_unsafe_view", "flatten"}
"""Operators that pass on what they read, in another form."""


@dataclass(frozen=True)
class _Mixture:
    """A router with its experts."""

    router: str
    experts: str
    """Modules."""
    parameters: tuple[str, ...]
    """The router's weight, the stacked weights, and the router's bias if it has one."""
    count: int
    picked: int


def find_experts(traced: Traced) -> Found:
    """The experts behind every router of a graph, and the routers whose experts cannot be gated."""
    readers: dict[_Mixture, list[fx.Node]] = {}
    calls: Counter[_Mixture] = Counter()
    refused: list[Refused] = []
    for node in traced.graph.nodes:
        if _operator(node) != "topk" or (count := _experts_of(traced, node)) is None:
            continue
        found = _mixture(traced, node, count)
        if isinstance(found, str):
            stacked = tuple(
                n for n, tensor in traced.parameters.items() if tensor.ndim > 2 and tensor.shape[0] == count
            )
            refused.append(Refused(module_path(node), count, (module_path(node),), found, stacked))
            continue
        mixture, own = found
        readers.setdefault(mixture, []).extend(own)
        calls[mixture] += 1
    groups = []
    for mixture, known in readers.items():
        if why := _read_elsewhere(traced, mixture, known):
            refused.append(Refused(mixture.router, mixture.count, (mixture.router,), why, mixture.parameters))
            del calls[mixture]
            continue
        units = np.arange(mixture.count, dtype=np.int64)
        modules = enumerate((mixture.router, mixture.experts))
        consumers = tuple(Consumer(module, mixture.parameters[i], -1, units) for i, module in modules)
        cut = {name: _along_first_axis(traced.parameters[name], units) for name in mixture.parameters}
        name = common_name(cut, consumers)
        groups.append(Group(name, UnitKind.EXPERT, mixture.count, 1, consumers, cut, fewest=mixture.picked))
    applied = tuple(Counter({mixture.router: n, mixture.experts: n}) for mixture, n in calls.items())
    return Found(tuple(groups), tuple(refused), ({},) * len(groups), applied)


def _along_first_axis(parameter: Tensor, units: IntArray) -> tuple[IntArray | None, ...]:
    return units, *(None for _ in parameter.shape[1:])


def _experts_of(traced: Traced, topk: fx.Node) -> int | None:
    """The number of experts that `topk` picks from; None if it picks something else, with no stacked weights."""
    scores = traced.flow.value(topk.args[0])
    count = scores.shape[-1] if scores is not None and scores.rank else 0
    stacked = any(tensor.ndim > 2 and tensor.shape[0] == count for tensor in traced.parameters.values())
    return count if stacked else None


def _mixture(traced: Traced, topk: fx.Node, count: int) -> tuple[_Mixture, list[fx.Node]] | str:
    """The router of `topk` with its experts, and the nodes that read their parameters; or why there is no gate."""
    logits = _logits(traced, topk, count)
    if isinstance(logits, str):
        return logits
    weight, path = traced.parameter_of(logits.args[1]), module_path(logits)  # type: ignore[arg-type]
    own = {id(tensor) for tensor in traced.model.get_submodule(path).parameters(recurse=False)}
    if weight is None or id(traced.parameters[weight]) not in own:
        return f"{place(logits)} reads no weight of its own module"
    lookups = _lookups(traced, topk, count)
    if isinstance(lookups, str):
        return lookups
    experts = {module_path(node) for node in lookups}
    if len(experts) > 1:
        return f"the weights of its experts are read by several modules: {', '.join(sorted(experts))}"
    if not _takes_numbers_and_weights(traced, topk, next(iter(lookups))):
        name = experts.pop() or "the model"
        return f"{name} computes the numbers or weights of experts itself: let a module of its own take them"
    bias = traced.parameter_of(logits.args[2]) if len(logits.args) > 2 else None  # type: ignore[arg-type]
    names = (weight, *dict.fromkeys(lookups.values()), *([] if bias is None else [bias]))
    picked = int(topk.args[1])  # type: ignore[arg-type]
    return _Mixture(path, experts.pop(), names, count, picked), [logits, *lookups]


def _logits(traced: Traced, topk: fx.Node, count: int) -> fx.Node | str:
    """The linear layer whose result `topk` picks from; or why it cannot be masked."""
    scores = topk.args[0]
    assert isinstance(scores, fx.Node)
    axis, largest = (*topk.args[2:], -1)[0], (*topk.args[3:], topk.kwargs.get("largest", True))[0]
    if axis not in (-1, scores.meta["val"].ndim - 1) or not largest:
        return f"{place(topk)} does not pick the largest along the last axis"
    reader = topk
    while _operator(scores) != "linear":
        if _users(scores) != {reader}:
            return f"something other than {place(topk)} reads the scores of {place(scores)}"
        softmax = _operator(scores) == "softmax" and scores.args[1] in (-1, scores.meta["val"].ndim - 1)
        if not (softmax or _operator(scores) in _PASS_ON) or scores.meta["val"].shape[-1] != count:
            return f"{place(scores)} is between the logits of the router and {place(topk)}"
        reader, scores = scores, scores.all_input_nodes[0]
    if _users(scores) != {reader}:
        return f"something other than {place(topk)} reads the logits of {place(scores)}"
    return scores


def _lookups(traced: Traced, topk: fx.Node, count: int) -> dict[fx.Node, str] | str:
    """Every operator that reads the numbers that `topk` picks, with the stacked parameter that it looks up."""
    lookups: dict[fx.Node, str] = {}
    waiting = [(user, topk) for user in _users(topk) if user.args[1:] == (1,)]
    while waiting:
        node, source = waiting.pop()
        if source is topk or (_operator(node) in _PASS_ON and node.args[0] is source):
            waiting += [(user, node) for user in _users(node)]
            continue
        parameter = _table(traced, node, source)
        if parameter is None or traced.parameters[parameter].shape[0] != count:
            return (
                f"{place(node)} reads the numbers of the experts for something other than looking up weights; of a "
                'Hugging Face model choose set_experts_implementation("batched_mm")'
            )
        lookups[node] = parameter
    return dict(sorted(lookups.items())) or "nothing looks up weights by what it picks"


def _table(traced: Traced, node: fx.Node, numbers: fx.Node) -> str | None:
    """The parameter in which `node` looks up positions of the first axis by `numbers`."""
    first_axis: dict[str, object] = {"index": [numbers], "index_select": 0, "embedding": numbers}
    table = node.args[0]
    if not isinstance(table, fx.Node) or table is numbers or node.args[1:2] != (first_axis.get(_operator(node)),):
        return None
    return traced.parameter_of(table)


def _read_elsewhere(traced: Traced, mixture: _Mixture, known: list[fx.Node]) -> str | None:
    """A message about another reader of the mixture's parameters; None if there is none."""
    for node, name in traced.placeholders.items():
        others = _users(node) - set(known)
        if name in mixture.parameters and others:
            return f"{place(min(others))} reads {name}, which is that of all experts"
    return None


def _takes_numbers_and_weights(traced: Traced, topk: fx.Node, lookup: fx.Node) -> bool:
    """Whether the module that looks up takes the numbers, and weights of the same shape, as inputs."""
    numbers, *others = [user for user in _users(topk) if user.args[1:] == (1,)] or [topk]
    shape = None if others else numbers.meta["val"].shape
    given = [node.meta["val"] for node in inputs_of(traced, lookup) if isinstance(node.meta.get("val"), Tensor)]
    integers = [value for value in given if not value.is_floating_point()]
    weights = [value for value in given if value.is_floating_point() and value.shape == shape]
    return len(integers) == len(weights) == 1 and integers[0].shape == shape


def _operator(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0].rstrip("_") if node.op == "call_function" else ""


def _users(node: fx.Node) -> set[fx.Node]:
    """The users of `node`, without the checks that torch.export adds."""
    return {user for user in node.users if "assert" not in str(user.target)}

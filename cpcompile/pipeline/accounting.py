"""Parameter accounting: parameters in = parameters kept + parameters removed, by name, per context.

The frozen graph is compared with what the selection says that the context keeps. A parameter that
disappeared without being removed, one that should be gone but is still there, and one
that continues under another name all stop the build.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from cpcompile.core.errors import CpcompileError


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """Elements of every parameter before and after, for one context."""

    total_by_name: Mapping[str, int]
    kept_by_name: Mapping[str, int]
    kinds: Mapping[str, str]
    """Unit kind whose removal makes a parameter smaller, by name; absent for parameters that are never cut."""

    @property
    def total(self) -> int:
        return sum(self.total_by_name.values())

    @property
    def kept(self) -> int:
        return sum(self.kept_by_name.values())

    @property
    def removed(self) -> int:
        return self.total - self.kept

    @property
    def removed_by_kind(self) -> dict[str, int]:
        removed: dict[str, int] = {}
        for name, total in self.total_by_name.items():
            if gone := total - self.kept_by_name[name]:
                kind = self.kinds.get(name, "other")
                removed[kind] = removed.get(kind, 0) + gone
        return removed


def account(
    context: str,
    graph: ir.Graph,
    *,
    total: Mapping[str, int],
    expected: Mapping[str, int],
    kinds: Mapping[str, str],
    used: Callable[[], Mapping[str, int]],
    dynamic: ir.Graph | None = None,
) -> Accounting:
    """Compare the frozen `graph` of `context` with the parameters that it should hold.

    total: elements by name in the eager model; expected: elements that the selection keeps; used: elements that any
    context may read, called only if a parameter has fewer than the selection keeps; dynamic: the graph of all contexts,
    by which buffers and other constants are told from parameters under another name.
    CpcompileError names every parameter that does not add up.
    """
    sizes = {
        name: prod(value.const_value.shape.numpy()) for name, value in graph.initializers.items() if value.const_value
    }
    kept = {name: int(sizes.get(name, 0)) for name in total}
    if any(kept[name] < expected[name] for name in total):
        # Rows of a table that the model itself never picks go as well, from what the selection keeps.
        some = used()
        expected = {name: expected[name] * some.get(name, 0) // max(total[name], 1) for name in total}
    wrong = [
        f"{name}: {kept[name]:,} of {total[name]:,} elements are in the graph, the selection keeps {expected[name]:,}"
        for name in total
        if kept[name] != expected[name]
    ]
    # A parameter under another name would look removed; only vectors such as folded gates may be new.
    wrong += [
        f"{name}: {sizes[name]:,} elements that belong to no parameter"
        for name, value in graph.initializers.items()
        if name not in total
        and value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and np.count_nonzero(np.asarray(value.const_value.shape.numpy()) > 1) > 1
        and not (dynamic is not None and _is_constant(dynamic, name, total))
    ]
    if wrong:
        raise CpcompileError(
            f"{context}: parameters do not add up after freezing; the bundle is not written.\n  " + "\n  ".join(wrong)
        )
    return Accounting(total_by_name=dict(total), kept_by_name=kept, kinds=dict(kinds))


def _is_constant(dynamic: ir.Graph, name: str, parameters: Mapping[str, int]) -> bool:
    """Whether `dynamic` computes the value `name` without any input or parameter."""
    values = {value.name: value for node in dynamic for value in node.outputs} | dict(dynamic.initializers)
    if name not in values:
        return False
    waiting = [values[name]]
    seen = set(waiting)
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value.is_graph_input() or value.name in parameters or (node is None and value.const_value is None):
            return False
        found = {source for source in (node.inputs if node is not None else ()) if source is not None} - seen
        seen |= found
        waiting += found
    return True

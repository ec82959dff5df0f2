"""What holds after every pass: outputs have their names, element types and ranks, and weights their types."""

from __future__ import annotations

from itertools import zip_longest

import onnx_ir as ir

from cpcompile.core.errors import CpcompileError

Output = tuple[str | None, ir.TypeProtocol | None, int | None]
"""Name, type and rank, as far as they are known."""


GONE: Output = (None, None, None)


class InterfaceError(ir.passes.PostconditionError, CpcompileError):
    """A pass changed what it must not change: a defect of the pass."""


class GraphPass(ir.passes.InPlacePass):
    """A pass that keeps the interface of the model, or raises InterfaceError."""

    def may_remove(self, output: str) -> bool:
        """Whether the pass may remove that output: none, but for what it is told to."""
        return False

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> ir.passes.PassResult:
        """Run the pass, and compare the outputs before and after."""
        model = model_or_result if isinstance(model_or_result, ir.Model) else model_or_result.model
        outputs, mislabelled = _outputs(model), _mislabelled(model)
        result = super().__call__(model)
        now = _outputs(result.model)
        left = {name for name, *_ in now}
        kept = [each for each in outputs if each[0] in left or not self.may_remove(each[0] or "")]
        changed = [
            f"the output {old[0]} was {_described(old)} and is {_described(new)}"
            for old, new in zip_longest(kept, now, fillvalue=GONE)
            if GONE in (old, new) or any(a is not None is not b and a != b for a, b in zip(old, new, strict=True))
        ]
        changed += [text for text in _mislabelled(result.model) if text not in mislabelled]
        if changed:
            name = type(self).__module__.rpartition(".")[2]
            raise InterfaceError(
                f"after the pass {name}, {changed[0]}; this is a defect of cpcompile: leave the pass out of --passes, "
                "and report the model"
            )
        return result


def _outputs(model: ir.Model) -> list[Output]:
    return [(v.name, v.type, None if v.shape is None else v.shape.rank()) for v in model.graph.outputs]


def _described(output: Output) -> str:
    return f"{output[0]}: {output[1]} of rank {output[2]}"


def _mislabelled(model: ir.Model) -> list[str]:
    """Initializers that hold another type than they are declared to have."""
    return [
        f"the initializer {value.name} is declared as {value.dtype} and holds {value.const_value.dtype}"
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and value.dtype not in (None, value.const_value.dtype)
    ]

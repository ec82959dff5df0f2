"""What callers may give to `partition`, `select_units` and `save_program`, and the sentence that they get otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cpcompile
from cpcompile.core.errors import UsageError
from cpcompile.partitioning import PartitionedModule

INPUT = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def square(output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    return output.square().sum()


@pytest.mark.parametrize("inputs", [INPUT, (INPUT,), [INPUT]], ids=["tensor", "tuple", "list"])
def test_example_inputs_are_a_tensor_or_several(inputs: Any) -> None:
    module = cpcompile.partition(net(), inputs, align=1, kinds=["ffn"])
    assert module.example_inputs == (INPUT,) and module.groups


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": "net"}, "model is a str: a torch.nn.Module is needed"),
        ({"example_inputs": {"x": INPUT}}, "example_inputs is a dict: a tuple of tensors is needed"),
        ({"example_inputs": (INPUT, None)}, r"example_inputs\[1\] is a NoneType: a tensor is needed"),
        ({"contexts": 0}, "contexts is 0: it has to be at least 1"),
        ({"contexts": "two"}, "contexts is 'two': int is needed"),
        ({"align": 0}, "align is 0: it has to be at least 1"),
        ({"align": 1.5}, "align is 1.5: int is needed"),
        ({"kinds": ["heads"]}, "kinds: 'heads' is none of ffn, head, vocabulary, expert, layer"),
    ],
)
def test_what_cannot_be_partitioned_is_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        cpcompile.partition(**{"model": net(), "example_inputs": (INPUT,)} | arguments)


@pytest.fixture(scope="module")
def module() -> PartitionedModule:
    return cpcompile.partition(net(), (INPUT,), contexts=2, align=1)


def test_a_batch_may_be_a_tensor_and_examples_as_well(module: PartitionedModule, tmp_path: Path) -> None:
    bare: Any = {"a": [INPUT], "b": [INPUT + 1]}
    wrapped = {context: [(batch,) for batch in batches] for context, batches in bare.items()}
    selection = cpcompile.select_units(module, bare, square, {"ffn": 0.5})
    again = cpcompile.select_units(module, wrapped, square, {"ffn": 0.5})
    assert (selection.kept["ffn"] == again.kept["ffn"]).all()  # type: ignore[index]
    cpcompile.save_program(module, selection, str(tmp_path / "net.pt2"), examples=bare)
    assert (tmp_path / "net.pt2").stat().st_size > 0
    for path, says in ((tmp_path / "net.onnx", "net.onnx: is not named .pt2"), (3, "3 is not a path")):
        with pytest.raises(UsageError, match=says):
            cpcompile.save_program(module, selection, path, examples=bare)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"examples: a\[0\] is a list|examples: a\[0\]\[0\] is a int"):
        cpcompile.save_program(module, selection, tmp_path / "x.pt2", examples={"a": [[1]]})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batches": [INPUT, INPUT]}, "batches is a list: a dict by context is needed"),
        ({"batches": {"a": [INPUT], "b": []}}, "batches: 'b' has none; give one at least"),
        ({"batches": {"a": [INPUT], "b": [3]}}, r"batches: b\[0\] is a int: a tuple of tensors is needed"),
        ({"budgets": 0.5}, "budgets is 0.5: a table is needed"),
        ({"budgets": {"ffn": "half"}}, "budgets.ffn is 'half': float is needed"),
        ({"budgets": {"ffn": float("nan")}}, "budgets.ffn is nan: a finite number"),
        ({"specificity": None}, "specificity is None: float is needed"),
        ({"floor": 2}, "floor is 2.0: it lies from 0 to 1"),
    ],
)
def test_units_that_cannot_be_selected_are_named(
    module: PartitionedModule, arguments: dict[str, Any], says: str
) -> None:
    usual = {"batches": {"a": [INPUT], "b": [INPUT]}, "loss": square, "budgets": {"ffn": 0.5}}
    with pytest.raises(UsageError, match=says):
        cpcompile.select_units(module, **usual | arguments)

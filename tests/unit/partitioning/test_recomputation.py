"""Modules that run again in a backward pass: the gates of their own forward pass, and the same gradients."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from cpcompile.core.errors import UsageError
from cpcompile.partitioning import PartitionedModule, partition
from tests.unit.partitioning.models import WIDTH, Feed, randomise

ROOT = Path(__file__).parents[3]
Again = Callable[[nn.Module, Tensor], Tensor]


class Recomputed(torch.autograd.Function):
    """Keeps the input alone, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor) -> Any:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, gradients[0])
        return None, x.grad


def once(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


def kept(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def nested(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(kept, block, x, use_reentrant=False)


def nested_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(reentrant, block, x, use_reentrant=True)


def own_function(block: nn.Module, x: Tensor) -> Tensor:
    return Recomputed.apply(block, x)  # type: ignore[no-any-return]


WAYS: list[Again] = [kept, reentrant, nested, nested_reentrant, own_function]


class Stack(nn.Module):
    """Two layers with one up-projection, so that a group has consumers in both, and a third."""

    def __init__(self) -> None:
        super().__init__()
        first = Feed()
        self.blocks = nn.ModuleList([first, Feed(first.up), Feed()])
        self.again: Again = once

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.again(block, x)
        return x


def made() -> PartitionedModule:
    model = Stack()
    randomise(model)
    module = partition(model, (torch.zeros(2, 3, WIDTH),), contexts=2, align=8)
    with torch.no_grad():
        for gate in module.group_gates:
            gate.table.uniform_(0.5, 1.5)
            gate.table[0, 0] = 0
    return module


def gradients(module: PartitionedModule, loss: Callable[[PartitionedModule, Tensor], Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss(module, x).backward()
    assert x.grad is not None
    return {"x": x.grad} | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def one(module: PartitionedModule, x: Tensor) -> Tensor:
    return module(x, context=torch.tensor(1)).square().sum()


def two(module: PartitionedModule, x: Tensor) -> Tensor:
    """Two contexts before one backward pass."""
    return (module(x + 1, context=torch.tensor(1)) * module(x, context=torch.tensor(0))).sum()


def chained(module: PartitionedModule, x: Tensor) -> Tensor:
    """The second pass reads the output of the first."""
    return module(module(x, context=torch.tensor(0)), context=torch.tensor(1)).square().sum()


def outside(module: PartitionedModule, x: Tensor) -> Tensor:
    """The whole module is what runs again."""
    whole = lambda x: module(x, context=torch.tensor(1))  # noqa: E731
    return checkpoint(whole, checkpoint(whole, x, use_reentrant=True), use_reentrant=False).square().sum()


@pytest.mark.parametrize("loss", [one, two, chained, outside])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the inner one of two
def test_gradients_are_those_without_recomputation(
    way: Again, loss: Callable[[PartitionedModule, Tensor], Tensor]
) -> None:
    module = made()
    expected = gradients(module, loss)
    module.model.again = way  # type: ignore[assignment]
    found = gradients(module.train(), loss)
    assert found.keys() == expected.keys() and any(name.endswith(".table") for name in found)
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-5), name


def test_gates_per_sequence() -> None:
    module = made()
    rows = [torch.rand(2, gate.units, requires_grad=True) for gate in module.group_gates]
    x = torch.randn(2, 3, WIDTH)
    expected = torch.autograd.grad(module.with_rows(x, rows=rows).square().sum(), rows)
    module.model.again = kept  # type: ignore[assignment]
    found = torch.autograd.grad(module.with_rows(x, rows=rows).square().sum(), rows)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_what_runs_outside_of_every_pass_is_refused() -> None:
    module = made()
    message = "has gates: call the PartitionedModule, with a context"
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    one(module, x).backward()
    with pytest.raises(UsageError, match=message):
        module.model(x)
    broken = module(x, context=torch.tensor(0))
    broken.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.sum().backward()
    with pytest.raises(UsageError, match=message):
        module.model(x)
    hidden: list[Tensor] = []
    module.model.again = kept  # type: ignore[assignment]
    handle = module.model.blocks[1].register_forward_hook(lambda *a: hidden.append(a[2]))  # type: ignore[union-attr]
    module(x, context=torch.tensor(0))
    handle.remove()
    with pytest.raises(UsageError, match=message):
        hidden[0].sum().backward()  # not through an output: nobody knows its gates


def test_functional_forms() -> None:
    module = made()
    x, context = torch.randn(2, 3, WIDTH), torch.tensor(1)
    state = {name: value.detach() for name, value in module.named_parameters()}
    expected = gradients(module, lambda module, _: module(x, context=context).square().sum() + _.sum() * 0)

    def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, state, (x,), {"context": context}).square().sum()

    for name, gradient in grad(loss)(state, x).items():
        if name in expected:
            assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-5), name
    each = vmap(grad(loss), in_dims=(None, 0))(state, x.unsqueeze(1))
    for name, gradient in each.items():
        if name in expected:
            assert torch.allclose(gradient.sum(0), expected[name], rtol=1e-4, atol=1e-4), name
    contexts = vmap(lambda c: module(x, context=c))(torch.tensor([0, 1]))
    assert torch.allclose(contexts[0], module(x, context=torch.tensor(0)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(contexts[0], contexts[1], rtol=1e-2)


def test_a_copy_has_gates_of_its_own() -> None:
    module = made()
    x, context = torch.randn(2, 3, WIDTH), torch.tensor(0)
    before = module(x, context=context)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for gate in twin.group_gates:
            gate.table.zero_()
    assert torch.equal(module(x, context=context), before)
    assert not torch.equal(twin(x, context=context), before)


def train_distributed(store: Path) -> None:
    module = made()
    expected = gradients(module, one)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    try:
        wrapped: Any = nn.parallel.DistributedDataParallel(module)
        module.model.again = kept  # type: ignore[assignment]
        found = gradients(wrapped, one)
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in expected.items():
        own = found[name if name == "x" else f"module.{name}"]
        assert torch.allclose(own, gradient, rtol=1e-5, atol=1e-5), name


@pytest.mark.slow
def test_distributed_training(tmp_path: Path) -> None:
    """In a process of its own: its threads have hung in one that had run many other tests."""
    code = f"from {__name__} import Path, train_distributed; train_distributed(Path({str(tmp_path / 'store')!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_sequential_segments() -> None:
    class Segments(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(list(self), 2, x, use_reentrant=False) if self.training else super().forward(x)

    model = Segments(Feed(), Feed(), Feed())
    randomise(model)
    module = partition(model, (torch.zeros(2, 3, WIDTH),), contexts=2, align=8)
    expected = gradients(module.eval(), one)
    found = gradients(module.train(), one)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-5) for name in expected)

"""Forms of modules: what `partition` accepts is built and equals the module; the rest it refuses, with the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from cpcompile.core.errors import UsageError
from cpcompile.core.selection import Selection
from cpcompile.frontend.program import save_program
from cpcompile.frontend.source import open_source
from cpcompile.partitioning import PartitionedModule, partition
from cpcompile.passes.freeze import freeze, prepare, used_sizes
from cpcompile.pipeline.accounting import Accounting, account
from tests.unit.partitioning.models import WIDTH, Feed, assert_accounted, randomise
from tests.unit.passes.graph_text import run

X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(3))
CONTEXTS = ("day", "night")


def built(
    path: Path, model: nn.Module, inputs: tuple[Tensor, ...] = (X,), **options: Any
) -> tuple[PartitionedModule, Accounting]:
    """Every context of `model`, partitioned, saved and frozen, gives what the module gives, and adds up."""
    module = partition(model, inputs, contexts=2, align=8, **options)
    rng = np.random.default_rng(0)
    tables = {units.kind: rng.random((2, units.layers, units.count)) < 0.5 for units in module.units()}
    for table in tables.values():
        table[:, :, 0] = True
    save_program(module, Selection(CONTEXTS, tables), path / "model.pt2")
    source = open_source(path / "model.pt2")
    dynamic = source.capture(opset=23)
    prepared = prepare(dynamic)
    for index, context in enumerate(CONTEXTS):
        frozen = freeze(prepared, index)
        onnx.checker.check_model(ir.to_proto(frozen.model), full_check=True)
        with torch.no_grad():
            leaves = module.outputs.of(module(*inputs, context=module.gate_row(index)))
        names = module.input_names()
        outputs = run(frozen.model, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        assert list(outputs) == module.output_names()
        for (name, output), leaf in zip(outputs.items(), leaves, strict=True):
            assert output.dtype == leaf.numpy().dtype and output.shape == leaf.shape, name
            assert np.abs(output.astype(np.float64) - leaf.numpy()).max(initial=0) <= 1e-5 * max(
                np.abs(output).max(), 1
            ), name
        accounting = account(
            context,
            frozen.model.graph,
            total=source.parameter_sizes(),
            expected=source.kept_sizes(context, None),
            kinds=dict.fromkeys(source.unused, "unused"),
            used=lambda: used_sizes(prepared),
            dynamic=dynamic.graph,
        )
    return module, accounting


class Around(Feed):
    """A feed-forward network, with `give` of its input and output as the result."""

    def __init__(self, give: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        randomise(self)
        self.give = give
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Any:
        return self.give(self, x, super().forward(x))


GIVEN: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], list[str]]] = {
    "nothing beside it": (lambda _, x, y: (y, None), ["output"]),
    "nothing before it": (lambda _, x, y: [None, y, None], ["output"]),
    "the input": (lambda _, x, y: (y, x), ["output_0", "output_1"]),
    "a view of the input": (lambda _, x, y: (y, x.contiguous(), x.view(2, -1)), ["output_0", "output_1", "output_2"]),
    "the input alone and twice": (lambda _, x, y: (x, y, x), ["output_0", "output_1", "output_2"]),
    "itself": (lambda _, x, y: (y, y), ["output_0", "output_1"]),
    "itself in the end": (
        lambda _, x, y: (y, y.detach(), F.dropout(y, training=False)),
        ["output_0", "output_1", "output_2"],
    ),
    "a parameter": (lambda m, x, y: (y, m.scale), ["output_0", "output_1"]),
    "a constant": (lambda _, x, y: (y, torch.ones(3)), ["output_0", "output_1"]),
    "numbers and flags": (lambda _, x, y: (y, y.argmax(-1), y > 0), ["output_0", "output_1", "output_2"]),
    "a dict": (lambda _, x, y: {"last": y, "none": None, "first": x}, ["last", "first"]),
    "a dict in a tuple": (lambda _, x, y: (y, {"first": x, "all": [y, None]}), ["output_0", "output_1", "output_2"]),
    "double": (lambda _, x, y: y.double(), ["output"]),
}


ALWAYS = ("the input", "numbers and flags", "a dict in a tuple")


@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in GIVEN])
def test_outputs_of_many_forms(name: str, tmp_path: Path) -> None:
    give, names = GIVEN[name]
    module, _ = built(tmp_path, Around(give))
    assert module.output_names() == names


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda _, x, y: (y, 3), "Around: output 1 is a int, not a tensor; leave it out: forward=lambda"),
        (lambda _, x, y: (y, "text"), "Around: output 1 is a str, not a tensor"),
        (lambda _, x, y: None, "Around: gives no tensor"),
        (lambda _, x, y: y.bfloat16(), "Around: output is of torch.bfloat16; convert it to torch.float32"),
        (lambda _, x, y: (y, torch.fft.rfft(y)), "Around: output_1 is of torch.complex64"),
    ],
)
def test_outputs_without_an_engine_are_refused(give: Callable[..., Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        partition(Around(give), (X,), align=8)


class Unread(Feed):
    """A pooler, an auxiliary head, and parameters of which only the shape or the type is read."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler, self.auxiliary = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 7)
        self.sized, self.zeros, self.typed = (nn.Parameter(torch.rand(WIDTH)) for _ in range(3))
        self.grid, self.empty = nn.Parameter(torch.rand(3, WIDTH)), nn.Parameter(torch.rand(0, 4))
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.pooler(y)
        y = y * self.sized.shape[0] + torch.zeros_like(self.zeros) + y.new_zeros(1).type_as(self.typed)
        return y + y[:, :1].expand_as(y) + self.sized.new_ones(WIDTH) + x[:1].view_as(x[:1]) * len(self.grid)


def test_parameters_that_are_not_read(tmp_path: Path) -> None:
    module, accounting = built(tmp_path, Unread())
    unread = ["pooler.weight", "pooler.bias", "auxiliary.weight", "auxiliary.bias", "sized", "zeros", "typed", "grid"]
    assert sorted(module.unused) == sorted(unread)
    sizes = {name: p.numel() for name, p in module.model.named_parameters()}
    assert accounting.total == sum(sizes.values())
    assert accounting.removed_by_kind["unused"] == sum(sizes[name] for name in unread)
    assert_accounted(module)
    reasons = {refused.name: refused.reason for refused in module.refused}
    assert reasons["auxiliary.weight"] == reasons["grid"] == "the forward pass does not read it"


class Tensors(Feed):
    """Buffers of two axes, tables that are computed, and names that an exporter gives as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.randn(1, 12, WIDTH))
        self.register_buffer("mixing", torch.randn(WIDTH, WIDTH), persistent=False)
        self.add, self.mul, self.linear = (nn.Parameter(torch.rand(WIDTH)) for _ in range(3))
        self.x, self.output, self.val_0 = (nn.Parameter(torch.rand(WIDTH)) for _ in range(3))
        randomise(self)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = super().forward(x + self.positions[:, : x.shape[1]]) @ self.mixing
        y = y + torch.outer(torch.arange(3.0), torch.arange(16.0)).sin()  # a table that is computed
        return (y + self.add) * self.mul + self.linear * self.x + self.output * context * self.val_0


def test_a_context_is_a_number_or_a_tensor() -> None:
    module = partition(Feed(), contexts=2, example_inputs=(torch.randn(3, WIDTH),), align=4)
    randomise(module)  # the gates as well
    x = torch.randn(3, WIDTH)
    for context in (0, 1):
        assert torch.equal(module(x, context=context), module(x, context=torch.tensor(context)))
    assert not torch.equal(module(x, context=0), module(x, context=1))
    for context in (2, -1):
        with pytest.raises(UsageError, match=f"no context {context}: the model has 2, counted from 0"):
            module(x, context=context)


def test_names_that_are_taken(tmp_path: Path) -> None:
    module, _ = built(tmp_path, Tensors(), (X, torch.randn(1)))
    assert module.input_names() == ["x_", "context_"] and module.output_names() == ["output_"]


def test_inputs_without_names(tmp_path: Path) -> None:
    module, _ = built(tmp_path, Feed(), (X, X + 1), forward=lambda model, *xs: model(xs[0] - xs[1]))
    assert module.input_names() == ["input_0", "input_1"]


class Custom(Feed):
    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        randomise(self)
        change(self)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for name in ("extra", "table"):
            if hasattr(self, name):
                y = y + getattr(self, name).real[0]
        return y


def sharded(_: nn.Module) -> nn.Module:
    wrapper = nn.Sequential(Feed())
    wrapper.add_module("_fsdp_wrapped_module", Feed())
    return wrapper


def with_parameter(value: Tensor) -> Callable[[Any], Any]:
    return lambda model: model.register_parameter("extra", nn.Parameter(value, requires_grad=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.compile, "OptimizedModule is compiled; partition the module before torch.compile"),
        (lambda m: nn.Sequential(torch.compile(m)), "Sequential: 0 is compiled"),
        (lambda m: (m.compile(), m)[1], "Feed is compiled"),
        (nn.DataParallel, "DataParallel is wrapped by DataParallel; partition what it wraps"),
        (sharded, "Sequential is wrapped by Sequential; partition what it wraps"),
        (torch.jit.script, "RecursiveScriptModule is a ScriptModule, which torch.export cannot read; partition the Py"),
        (lambda m: torch.jit.trace(m, X), "TopLevelTracedModule is a ScriptModule"),
        (lambda m: nn.Sequential(torch.jit.script(m)), "Sequential: 0 is a ScriptModule"),
        (lambda m: m.bfloat16(), r"Feed: norm.weight is of torch.bfloat16; convert it to torch.float32: model.float"),
        (lambda m: m.half(), "Feed: norm.weight is of torch.float16"),
        (lambda m: m.double(), "Feed: norm.weight is of torch.float64"),
        (lambda m: torch.export.export(m, (X,)).module(), "GraphModule is an exported program; partition the module"),
        (lambda m: m.to("meta"), "Feed: norm.weight is on meta"),
        (lambda _: Custom(with_parameter(torch.ones(2, WIDTH) * 1j)), "Custom: extra is of torch.complex64"),
        (
            lambda _: Custom(with_parameter(torch.ones(2, WIDTH).to_sparse())),
            "Custom: extra is a .* of layout torch.spa",
        ),
        (lambda _: nn.Sequential(nn.LazyLinear(4)), "Sequential: 0.weight has no shape yet; run the model once"),
        (lambda m: m.forward, "model is a method: a torch.nn.Module is needed"),
        (lambda m: torch.export.export(m, (X,)), "model is a ExportedProgram: a torch.nn.Module is needed"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_modules_without_an_engine_are_refused(make: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        partition(make(Feed()), (X,), align=8)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (X.bfloat16(), "Feed: input 0 is of torch.bfloat16"),
        (X * 1j, "Feed: input 0 is of torch.complex64"),
        ([X], r"example_inputs\[0\] is a list: a tensor is needed; set other arguments in `forward`"),
        (None, r"example_inputs\[0\] is a NoneType: a tensor is needed"),
        (X.to("meta"), "Feed: input 0 is on meta"),
    ],
)
def test_inputs_without_an_engine_are_refused(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        partition(Feed(), (value,), align=8)


ACCEPTED: dict[str, Callable[[Feed], nn.Module]] = {
    "frozen": lambda m: m.requires_grad_(False),
    "graph module": lambda m: torch.fx.symbolic_trace(m),
    "weight norm": lambda m: nn.Sequential(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), m),
    "integer buffer": lambda _: Custom(lambda m: m.register_buffer("extra", torch.ones(2, WIDTH, dtype=torch.int64))),
    "complex buffer": lambda _: Custom(lambda m: m.register_buffer("extra", torch.ones(2, WIDTH) * (2 + 1j))),
    "mixed": lambda _: Custom(lambda m: m.register_buffer("extra", torch.ones(2, WIDTH).double())),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ("frozen", "integer buffer", "mixed") else n for n in ACCEPTED],
)
@pytest.mark.filterwarnings("ignore")
def test_modules_of_many_forms(name: str, tmp_path: Path) -> None:
    model = Feed()
    randomise(model)
    built(tmp_path, ACCEPTED[name](model))

"""Modules written by hand, as people write them, and what is done with all of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.core.selection import Selection
from cpcompile.frontend.capture import export_graph
from cpcompile.partitioning import PartitionedModule
from cpcompile.passes.freeze import freeze
from tests.unit.passes.graph_text import run

CONTEXTS = ("a", "b", "c")
WIDTH = 16


class GatedConvolution(nn.Module):
    """An FFN with a causal depthwise convolution on the gating branch, in a parallel residual with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32, bias=False)
        self.mix = nn.Conv1d(32, 32, 3, groups=32)
        self.down = nn.Linear(32, WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        mixed = self.mix(F.pad(self.gate(normed).transpose(1, 2), (2, 0))).transpose(1, 2)
        fed = self.down(F.silu(mixed) * self.up(normed))
        batch, sequence, _ = x.shape
        q, k, v = self.qkv(normed).view(batch, sequence, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1)
        attended = self.out((weights @ v).transpose(1, 2).reshape(batch, sequence, WIDTH))
        return x + fed + attended


class Feed(nn.Module):
    def __init__(self, up: nn.Linear | None = None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 32) if up is None else up
        self.down = nn.Linear(32, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class SharedWeights(nn.Module):
    """Two layers with one up-projection, one layer that runs twice, and an embedding that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, WIDTH)
        self.first = Feed()
        self.second = Feed(self.first.up)
        self.twice = Feed()
        self.head = nn.Linear(WIDTH, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(self.first(self.embedding(ids)))
        return self.head(self.twice(self.twice(x)))


class ConvolutionNetwork(nn.Module):
    """Batch norms, a residual whose channels can be removed, grouped channels, and a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.head = nn.Linear(16 * 16, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(image)))
        x = x + self.outer(F.relu(self.depthwise(self.inner(x))))
        return self.head(F.max_pool2d(x, 2).flatten(1))


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights large enough to be seen in the outputs."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.uniform_(0.5, 1.5)


def random_selection(module: PartitionedModule, seed: int = 0) -> Selection:
    """At least one unit of every group stays."""
    rng = np.random.default_rng(seed)
    kept = {}
    for units in module.units():
        table = rng.random((len(CONTEXTS), units.layers, units.count)) < 0.5
        table[:, :, 0] = True
        kept[units.kind] = table
    return Selection(CONTEXTS, kept)


def sizes(model: ir.Model) -> dict[str, int]:
    return {n: int(np.prod(v.const_value.shape.numpy())) for n, v in model.graph.initializers.items() if v.const_value}


def capture_partitioned(module: PartitionedModule, *, opset: int = 23) -> ir.Model:
    """The dynamic graph of `module`, with inputs named as in its forward function."""
    first = {id(tensor): name for name, tensor in module.model.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return export_graph(
        module.eval(),
        module.example_inputs,
        {name: first[id(tensor)] for name, tensor in every if id(tensor) in first},
        opset=opset,
        kwargs={"context": torch.tensor(0)},
        input_names=[*module.input_names(), "context"],
        dynamic_shapes=module.dynamic_shapes and {"inputs": module.dynamic_shapes, "context": None},
    )


def assert_freezes(
    module: PartitionedModule, selection: Selection, inputs: tuple[Tensor, ...], opset: int = 23
) -> dict[str, dict[str, int]]:
    """Every context: as small as the selection says, same values as the masked module. Returns the kept sizes."""
    assert_accounted(module)
    module.eval()
    with torch.no_grad():
        for gate in module.group_gates:
            gate.table.uniform_(0.5, 1.5)  # learned scales: a gate that stays is not 1
    module.select(selection)
    dynamic = capture_partitioned(module, opset=opset)
    kept = {}
    for index, context in enumerate(CONTEXTS):
        frozen = freeze(dynamic, index)
        onnx.checker.check_model(ir.to_proto(frozen.model), full_check=True)
        kept[context] = module.kept_sizes(selection, context)
        got = sizes(frozen.model)
        assert {name: got.get(name, 0) for name in kept[context]} == kept[context]
        with torch.no_grad():
            expected: npt.NDArray[np.float32] = module(*inputs, context=module.gate_row(index)).numpy()
        names = [value.name or "" for value in frozen.model.graph.inputs]
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        (output,) = run(frozen.model, feeds).values()
        assert output.shape == expected.shape and np.isfinite(expected).all()
        assert np.abs(output - expected).max() <= 1e-5 * np.abs(expected).max()
    return kept


def assert_accounted(module: PartitionedModule) -> None:
    """Every parameter with more than one axis is in a group, or refused with a reason."""
    known = {name for group in module.groups for name in group.parameters}
    known |= {name for refused in module.refused if refused.reason for name in refused.parameters}
    matrices = {name for name, parameter in module.model.named_parameters() if parameter.ndim > 1}
    assert matrices <= known, sorted(matrices - known)

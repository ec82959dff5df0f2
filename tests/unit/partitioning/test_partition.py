"""Modules of any make: groups found, or refused with the reason; gates that change nothing; freezing."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from cpcompile.core.errors import UsageError
from cpcompile.core.selection import Selection, UnitKind
from cpcompile.partitioning import PartitionedModule, partition
from tests.unit.partitioning.models import (
    CONTEXTS,
    WIDTH,
    ConvolutionNetwork,
    Feed,
    GatedConvolution,
    SharedWeights,
    assert_accounted,
    assert_freezes,
    random_selection,
    randomise,
)

BATCH, SEQUENCE = Dim("batch"), Dim("sequence")
HIDDEN = ({0: BATCH, 1: SEQUENCE},)


def hidden(batch: int = 2, sequence: int = 6, seed: int = 1) -> tuple[Tensor]:
    return (torch.randn(batch, sequence, WIDTH, generator=torch.Generator().manual_seed(seed)),)


def reasons(module: PartitionedModule) -> dict[str, str]:
    return {refused.name: refused.reason for refused in module.refused}


def test_gated_convolution_beside_attention() -> None:
    model = GatedConvolution()
    randomise(model)
    names = list(model.state_dict())
    before = model(*hidden())
    module = partition(model, hidden(), contexts=3, dynamic_shapes=HIDDEN, align=4)
    assert list(model.state_dict()) == names
    assert torch.equal(module(*hidden(), context=torch.tensor(2)), before)
    ffn, heads = sorted(module.groups, key=lambda group: group.kind)
    assert (ffn.kind, ffn.units, ffn.width) == (UnitKind.FFN, 8, 4)
    assert set(ffn.parameters) == {
        *("gate.weight", "gate.bias", "up.weight", "mix.weight", "mix.bias", "down.weight"),
    }
    assert (heads.kind, heads.units, heads.width) == (UnitKind.HEAD, 4, 4)
    assert set(heads.parameters) == {"qkv.weight", "qkv.bias", "out.weight"}
    assert [group.name for group in (ffn, heads)] == ["down", "out"]
    reads = {name: f"linear in {name} reads channels that no parameter makes" for name in ("gate", "up", "qkv")}
    assert reasons(module) == reads
    selection = random_selection(module)
    kept = assert_freezes(module, selection, hidden(3, 9))
    for context in CONTEXTS:
        blocks = int(selection.row(context)[UnitKind.FFN].sum())
        assert kept[context]["mix.weight"] == blocks * 4 * 3
        assert kept[context]["qkv.weight"] == int(selection.row(context)[UnitKind.HEAD].sum()) * 3 * 4 * WIDTH


def test_a_branch_with_nothing_left_goes_with_its_norm() -> None:
    model = nn.Sequential(Feed(), Feed())
    randomise(model)
    module = partition(model, hidden(), contexts=3, dynamic_shapes=HIDDEN, align=8)
    kept = np.ones((3, 2, 4), dtype=np.bool_)
    kept[1, 0] = False
    kept[2] = False
    sizes = assert_freezes(module, Selection(CONTEXTS, {UnitKind.FFN: kept}), hidden(1, 4))
    assert sum(sizes["a"].values()) == sum(p.numel() for p in model.parameters())
    assert {name for name, size in sizes["b"].items() if size} == {
        n for n, _ in model.named_parameters() if n[0] == "1"
    }
    assert sum(sizes["c"].values()) == 0


def test_shared_weights_share_their_gates() -> None:
    model = SharedWeights()
    randomise(model)
    ids = (torch.arange(12).reshape(2, 6),)
    module = partition(model, ids, contexts=3, dynamic_shapes=HIDDEN, align=8)
    by_consumer = {tuple(consumer.module for consumer in group.consumers): group for group in module.groups}
    assert set(by_consumer) == {("first.down", "second.down"), ("twice.down",)}
    module(*ids, context=torch.tensor(0))
    assert sorted(module.calls.values()) == [1, 1, 2]
    assert [(refused.channels, refused.reason) for refused in module.refused] == [
        (WIDTH, "rms_norm in first.norm is over all of it")
    ]
    kept = assert_freezes(module, random_selection(module), (torch.arange(21).reshape(3, 7),))
    assert kept["a"]["embedding.weight"] == 40 * WIDTH


class Repeated(nn.Module):
    """One block under two names."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_module_under_several_names_is_one_module() -> None:
    module = partition(Repeated(), hidden(), contexts=3, dynamic_shapes=HIDDEN, align=8)
    module(*hidden(), context=torch.tensor(0))
    assert module.calls == {("blocks.0", "blocks.0.2"): 2}
    assert_freezes(module, random_selection(module), hidden(3, 7))


def test_channels_of_a_convolution_network() -> None:
    model = ConvolutionNetwork().eval()
    randomise(model)
    image = (torch.randn(2, 3, 8, 8),)
    module = partition(model, image, contexts=3, align=4)
    by_consumer = {tuple(consumer.module for consumer in group.consumers): group for group in module.groups}
    assert set(by_consumer) == {("inner", "head"), ("outer",)}
    stage = by_consumer["inner", "head"]
    assert stage.units == 4
    assert [consumer.axis for consumer in stage.consumers] == [-3, -1]
    assert stage.consumers[1].unit_of_channel.tolist() == [unit for unit in range(4) for _ in range(4 * 16)]
    assert {"stem.weight", "stem_norm.weight", "outer.bias", "head.weight"} <= set(stage.parameters)
    assert reasons(module) == {"stem": "conv2d in stem reads channels that no parameter makes"}
    assert_freezes(module, random_selection(module), (torch.randn(2, 3, 8, 8),))


class InnerNorm(Feed):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.rms_norm(F.gelu(self.up(x)), (32,)))


class FunctionalDown(Feed):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(F.gelu(self.up(self.norm(x))), self.down.weight)


class OwnProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(WIDTH, 32)), nn.Parameter(torch.randn(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.up) @ self.down


class Sorted(Feed):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).sort(dim=-1).values)


class ReadTwice(Feed):
    def forward(self, x: Tensor) -> Tensor:
        up = self.up(self.norm(x))
        return torch.cat((x + self.down(F.gelu(up)), up), dim=-1)


class Half(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.chunk(2, dim=-1)[0], self.weight)


class ReadsAnItem(Feed):
    def __init__(self) -> None:
        super().__init__()
        self.down = Half(16, WIDTH)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (ReadsAnItem, "down (16 channels): down computes what linear in down reads"),
        (InnerNorm, "down (32 channels): rms_norm is over all of it"),
        (FunctionalDown, "down (32 channels): linear uses down.weight by a function"),
        (OwnProduct, "down (32 channels): OwnProduct computes what matmul reads: let a module of its own"),
        (Sorted, "down (32 channels): there is no rule for sort"),
        (ReadTwice, "down (32 channels): it is an output of the model"),
    ],
)
def test_what_cannot_be_gated_says_why(made: type[nn.Module], reason: str) -> None:
    with pytest.raises(UsageError, match="has no channels that can be gated") as raised:
        partition(made(), hidden(), dynamic_shapes=HIDDEN, align=8)
    assert reason in str(raised.value)


def test_units_no_smaller_than_align() -> None:
    with pytest.raises(UsageError, match="its 32 channels are one unit of 32: choose a smaller align"):
        partition(Feed(), hidden(), dynamic_shapes=HIDDEN)


def test_groups_of_different_sizes_and_a_smaller_last_unit() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(WIDTH, 20), nn.Linear(20, 48), nn.Linear(48, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    model = Uneven()
    randomise(model)
    module = partition(model, hidden(), contexts=3, dynamic_shapes=HIDDEN, align=8)
    assert [(group.name, group.units) for group in module.groups] == [("b", 3), ("c", 6)]
    assert module.exists(UnitKind.FFN).tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    kept = np.ones((3, 2, 6), dtype=np.bool_)
    kept[0, 0, :2] = kept[1, 1, 1::2] = False
    sizes = assert_freezes(module, Selection(CONTEXTS, {UnitKind.FFN: kept}), hidden(1, 3))
    assert sizes["a"]["a.weight"] == 4 * WIDTH
    assert sizes["b"]["b.weight"] == 24 * 20
    with pytest.raises(UsageError, match=r"has \(layers, units\) \(2, 5\), the model \(2, 6\)"):
        module.select(Selection(CONTEXTS, {UnitKind.FFN: kept[:, :, :5]}))


def test_misuse_is_said() -> None:
    model = Feed()
    module = partition(model, hidden(), dynamic_shapes=HIDDEN, align=8)
    with pytest.raises(UsageError, match="down has gates: call the PartitionedModule, with a context"):
        model(*hidden())
    with pytest.raises(UsageError, match="has gates already: partition a fresh copy"):
        partition(model, hidden(), dynamic_shapes=HIDDEN, align=8)
    with pytest.raises(UsageError, match="Feed: torch.export cannot export it"):
        partition(Feed(), (torch.zeros(2, 3),), align=8)
    with pytest.raises(UsageError, match="removes units of kind head, of which the model has none"):
        module.select(Selection(("a",), {UnitKind.HEAD: np.zeros((1, 1, 4), dtype=np.bool_)}))


class Beside(Feed):
    """A feed-forward network that can be gated, beside a layer that may not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return super().forward(x) + (y[0] if isinstance(y, tuple) else y)


class Weights(nn.Module):
    """Weights that a function reads."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.read = nn.Parameter(torch.rand(shape)), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, self.w)


SQUARE = (WIDTH, WIDTH)
BESIDE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(*SQUARE)), "_weight_norm"),
    "old weight norm": (lambda: weight_norm(nn.Linear(*SQUARE)), "_weight_norm"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(*SQUARE)), "dot|mv|linalg"),
    "low rank": (lambda: Weights(SQUARE, lambda x, w: F.linear(x, w @ w.T)), "."),
    "einsum": (lambda: Weights(SQUARE, lambda x, w: torch.einsum("bsi,io->bso", x, w)), "einsum"),
    "einsum of heads": (
        lambda: Weights((4, WIDTH, 4), lambda x, w: torch.einsum("bsi,hio->bsho", x, w).flatten(2)),
        "einsum",
    ),
    "product": (lambda: Weights(SQUARE, lambda x, w: x @ w), "reads channels that no parameter makes"),
    "product from the left": (lambda: Weights((3, 6), lambda x, w: F.pad(w @ x, (0, 0, 0, 3))), "."),
    "batched product": (lambda: Weights((2, WIDTH, WIDTH), lambda x, w: (x.unsqueeze(1) @ w).sum(1)), "."),
    "vector": (lambda: Weights(SQUARE, lambda x, w: x + x[0, 0] @ w), "is of a vector"),
    "tensordot": (lambda: Weights(SQUARE, lambda x, w: torch.tensordot(x, w, dims=1)), "."),
    "transposed convolution": (
        lambda: Weights((WIDTH, WIDTH, 1), lambda x, w: F.conv_transpose1d(x.transpose(1, 2), w).transpose(1, 2)),
        "no rule for conv_transpose1d",
    ),
    "bilinear": (lambda: Weights((WIDTH, WIDTH, WIDTH), lambda x, w: F.bilinear(x, x, w)), "no rule for bilinear"),
    "recurrent": (lambda: nn.GRU(WIDTH, WIDTH, batch_first=True), "no rule for gru"),
    "table": (lambda: Weights(SQUARE, lambda x, w: x + F.embedding(x[..., 0].abs().long() % WIDTH, w)), "."),
    "rows": (lambda: Weights((9, WIDTH), lambda x, w: x + w[: x.shape[1]]), "."),
    "scale": (lambda: Weights((1, WIDTH), lambda x, w: x * w), "."),
    "attention of torch": (lambda: nn.MultiheadAttention(WIDTH, 1, batch_first=True), "."),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_every_matrix_is_in_a_group_or_refused(name: str) -> None:
    make, reason = BESIDE[name]
    layer = make()
    if name == "attention of torch":
        attention = layer
        layer = Weights((1,), lambda x, _: attention(x, x, x)[0])
        layer.attention = attention
    model = Beside(layer)
    module = partition(model, hidden(), align=8)
    assert_accounted(module)
    assert [group.name for group in module.groups if group.kind is UnitKind.FFN] == ["down"]
    matrices = {f"layer.{n}" for n, p in layer.named_parameters() if p.ndim > 1}
    grouped = {n for group in module.groups for n in group.parameters}
    for each in matrices - grouped:
        assert any(each in r.parameters and re.search(reason, r.reason) for r in module.refused), module.refused


def test_kinds_that_are_left_out_are_refused() -> None:
    module = partition(GatedConvolution(), hidden(), align=4, kinds=[UnitKind.FFN])
    assert reasons(module)["out"] == "kinds leaves out head"
    assert_accounted(module)
    with pytest.raises(
        UsageError, match=r"has no channels that can be gated\n(.*\n)*  out \(16 channels\): kinds leaves"
    ):
        partition(GatedConvolution(), hidden(), align=4, kinds=[UnitKind.EXPERT])


class JoinedHeads(nn.Module):
    """Scores get a bias that is not made by the heads, so that they cannot be told apart."""

    def __init__(self, flattened: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.flattened = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), flattened
        self.table, self.slopes = nn.Parameter(torch.rand(9, 4)), nn.Buffer(torch.rand(8, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.flattened:
            scores = torch.baddbmm(self.slopes, q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (-1, 4))
        else:
            scores = q @ k.mT + self.table[torch.arange(36) % 9].view(6, 6, 4).permute(2, 0, 1)
        return x + self.out((torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("flattened", "by"), [(True, "baddbmm"), (False, "add")])
def test_heads_that_are_one_unit_say_why(flattened: bool, by: str) -> None:
    module = partition(JoinedHeads(flattened), hidden(), align=4)
    assert [(group.kind, group.units) for group in module.groups] == [(UnitKind.HEAD, 1)]
    assert re.fullmatch(f"its 4 heads are one unit, because ({by}) couples them", reasons(module)["out"])
    assert_accounted(module)

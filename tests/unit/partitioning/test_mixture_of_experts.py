"""Experts as units: found and gated, or refused with the reason; graphs without them, equal to the masked model."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from cpcompile.core.errors import UsageError
from cpcompile.core.selection import BoolArray, Selection, UnitKind
from cpcompile.partitioning import PartitionedModule, partition
from cpcompile.partitioning.recover import recover_least_squares
from cpcompile.passes.freeze import Frozen, freeze
from cpcompile.training.importance import measure_group_importance
from tests.unit.partitioning.models import (
    CONTEXTS,
    WIDTH,
    Feed,
    assert_accounted,
    capture_partitioned,
    randomise,
    sizes,
)
from tests.unit.passes.graph_text import run

EXPERTS, PICKED, HIDDEN = 8, 2, 24
SHAPES = ({0: Dim("batch"), 1: Dim("sequence")},)
SMALL: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "num_experts_per_tok": PICKED, "max_position_embeddings": 64},
}


def mixtral(transformers: Any) -> Any:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=EXPERTS, intermediate_size=HIDDEN)
    return transformers.MixtralForCausalLM(config)


def qwen3(transformers: Any) -> Any:
    config = transformers.Qwen3MoeConfig(
        **SMALL, num_experts=EXPERTS, moe_intermediate_size=HIDDEN, intermediate_size=64, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


def chosen(*counts: tuple[int, ...], seed: int = 0) -> BoolArray:
    """(contexts, layers, experts): so many experts per context and layer, each time others."""
    rng = np.random.default_rng(seed)
    kept = np.zeros((len(counts), len(counts[0]), EXPERTS), dtype=np.bool_)
    for (context, layer), count in np.ndenumerate(counts):
        kept[context, layer, rng.choice(EXPERTS, count, replace=False)] = True
    return kept


SOME = chosen((3, 2), (3, 2), (3, 2))


def mask_routers(model: nn.Module, kept: BoolArray) -> None:
    """The definition: logits of removed experts are -inf. By the routers' own forward functions, written out again."""

    def forward(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        logits[:, ~self.kept] = -torch.inf
        scores, numbers = torch.softmax(logits, dim=-1).topk(PICKED, dim=-1)
        if getattr(self, "norm_topk_prob", True):
            scores = scores / scores.sum(dim=-1, keepdim=True)
        return logits, scores, numbers

    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    for router, own in zip(routers, kept, strict=True):
        router.kept = torch.from_numpy(own)
        router.forward = MethodType(forward, router)


@pytest.mark.slow
@pytest.mark.parametrize("make", [mixtral, qwen3])
def test_experts_of_hugging_face_models(make: Callable[[Any], Any]) -> None:
    """Captured once; contexts keep as many as are picked, more, and in one layer all."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")
    from cpcompile.partitioning.hugging_face import prepare_hugging_face

    ready = prepare_hugging_face(make(transformers))
    randomise(ready.model)
    module = partition(
        ready.model, ready.example_inputs, contexts=3, forward=ready.forward, dynamic_shapes=ready.dynamic_shapes
    )
    groups = {group.name: group for group in module.groups if group.kind is UnitKind.EXPERT}
    assert list(groups) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for name, group in groups.items():
        assert (group.units, group.fewest) == (EXPERTS, PICKED)
        assert [consumer.module for consumer in group.consumers] == [f"{name}.gate", f"{name}.experts"]
        weights = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        assert set(group.parameters) == {f"{name}.{weight}" for weight in weights}
    assert len([group for group in module.groups if group.kind is UnitKind.HEAD]) == 2
    counts = (2, 2), (3, 4), (2, EXPERTS)
    kept = chosen(*counts)
    assert not np.array_equal(kept[0, 0], kept[0, 1])
    selection = Selection(CONTEXTS, {UnitKind.EXPERT: kept})
    module.select(selection)
    dynamic = capture_partitioned(module)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, 8:] = 0
    ids = torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(2))
    whole = {name: parameter.numel() for name, parameter in ready.model.named_parameters()}
    per_expert = 3 * HIDDEN * 32 + 32
    for index, context in enumerate(CONTEXTS):
        frozen = freeze(dynamic, index)
        reference = prepare_hugging_face(make(transformers))
        reference.model.load_state_dict(ready.model.state_dict())
        mask_routers(reference.model, kept[index])
        with torch.no_grad():
            expected = reference.forward(reference.model, ids, mask).numpy()
            eager = module(ids, mask, context=module.gate_row(index)).numpy()
        assert np.array_equal(eager, expected)
        assert_same(frozen, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}, expected)
        left = sizes(frozen.model)
        assert {name: left.get(name, 0) for name in whole} == module.kept_sizes(selection, context)
        removed = sum(EXPERTS - count for count in counts[index])
        assert sum(whole.values()) - sum(left[name] for name in whole) == removed * per_expert
        staying = {name: tuple(np.flatnonzero(own).tolist()) for name, own in zip(groups, kept[index], strict=True)}
        assert {n: units for n, units in module.kept_units(selection, context).items() if n in groups} == staying
        smaller = [(name, own) for name, own in staying.items() if len(own) < EXPERTS]
        for router, (name, own) in zip(frozen.routers, smaller, strict=True):
            assert set(router.parameters) == set(groups[name].parameters)
            assert (router.experts, router.picked, router.kept) == (EXPERTS, PICKED, own)
            for parameter in router.parameters:
                axes = [axis for axis in frozen.kept[parameter] if axis is not None]
                assert [axis.tolist() for axis in axes] == [list(own)]


def assert_same(frozen: Frozen, feeds: dict[str, Any], expected: np.ndarray[Any, Any]) -> None:
    onnx.checker.check_model(ir.to_proto(frozen.model), full_check=True)
    (output,) = run(frozen.model, feeds).values()
    assert output.shape == expected.shape and np.isfinite(expected).all()
    assert np.abs(output - expected).max() <= 1e-5 * np.abs(expected).max()
    assert frozen.blocked == ()


class Stacked(nn.Module):
    """Experts with biases, weights stored (in, out), looked up by index_select."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.empty(EXPERTS, WIDTH, 8)), nn.Parameter(torch.empty(EXPERTS, 8))
        self.down = nn.Parameter(torch.empty(EXPERTS, 8, WIDTH))

    def forward(self, x: Tensor, *, weights: Tensor, numbers: Tensor) -> Tensor:
        flat = numbers.reshape(-1)
        up = self.up.index_select(0, flat).unflatten(0, numbers.shape)
        hidden = torch.relu(x[:, :, None, None] @ up + self.up_bias[numbers].unsqueeze(-2))
        down = self.down.index_select(0, flat).unflatten(0, numbers.shape)
        return ((hidden @ down).squeeze(-2) * weights.unsqueeze(-1)).sum(-2)


class Mixture(nn.Module):
    """A router with a bias and the softmax after topk, and a dense branch beside the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.router, self.experts, self.shared = nn.Linear(WIDTH, EXPERTS), Stacked(), Feed()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        scores, numbers = self.router(normed).topk(PICKED)
        return self.shared(x + self.experts(normed, numbers=numbers, weights=torch.softmax(scores, dim=-1)))


def hidden(batch: int = 2, sequence: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(batch, sequence, WIDTH, generator=torch.Generator().manual_seed(seed))


def two_mixtures() -> PartitionedModule:
    model = nn.Sequential(Mixture(), Mixture())
    randomise(model, 3)
    return partition(model, (hidden(),), contexts=3, dynamic_shapes=SHAPES, align=8)


@pytest.mark.slow
def test_a_mixture_written_by_hand_beside_dense_channels() -> None:
    module = two_mixtures()
    kinds = {group.name: (group.kind, group.units) for group in module.groups}
    experts, dense = (UnitKind.EXPERT, EXPERTS), (UnitKind.FFN, 4)
    assert kinds == {"0": experts, "1": experts, "0.shared": dense, "1.shared": dense}
    rng = np.random.default_rng(4)
    channels = rng.random((3, 2, 4)) < 0.5
    channels[:, :, 1] = True
    selection = Selection(CONTEXTS, {UnitKind.EXPERT: SOME, UnitKind.FFN: channels})
    with torch.no_grad():
        for gate in module.group_gates:
            gate.table.uniform_(0.5, 1.5)  # learned scales
    module.select(selection)
    dynamic = capture_partitioned(module)
    for index, context in enumerate(CONTEXTS):
        frozen, inputs = freeze(dynamic, index), hidden(3, 9, seed=5)
        with torch.no_grad():
            expected = module(inputs, context=module.gate_row(index)).numpy()
        (name,) = (value.name for value in frozen.model.graph.inputs)
        assert_same(frozen, {str(name): inputs.numpy()}, expected)
        left = sizes(frozen.model)
        assert module.kept_sizes(selection, context) == {n: left.get(n, 0) for n, _ in module.model.named_parameters()}
        assert [left[f"{layer}.router.bias"] for layer in (0, 1)] == [3, 2]


def test_the_gate_of_an_expert_scales_what_it_adds() -> None:
    """For whatever experts: weights are those of the softmax over the kept, times the gates."""
    module = two_mixtures()
    layer = module.model.get_submodule("0")
    assert isinstance(layer, Mixture)
    row = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 0.0, 1.5, -1.0])
    read: list[Tensor] = []
    handle = layer.experts.register_forward_pre_hook(
        lambda _module, _inputs, named: read.extend([named["weights"], named["numbers"]]), with_kwargs=True
    )
    x = hidden()
    rows = [row if group.name == "0" else torch.ones(group.units) for group in module.groups]
    with torch.no_grad():
        module.with_rows(x, rows=rows)
        handle.remove()
        normed = layer.norm(x)
        logits = F.linear(normed, layer.router.weight, layer.router.bias)
        kept = torch.tensor([1, 2, 3, 6, 7])
        scores, places = logits[..., kept].topk(PICKED)
    numbers = kept[places]
    assert torch.equal(read[1], numbers)
    assert torch.equal(read[0], torch.softmax(scores, dim=-1) * row[numbers])


def squares(output: Tensor, _inputs: tuple[Tensor, ...]) -> Tensor:
    return output.square().mean(dim=(1, 2)).sum()


def test_importance_of_experts() -> None:
    """Mean square of each sequence's gradient, against finite differences; what is never picked has none."""
    module = two_mixtures().double()
    inputs = hidden(3, 4, seed=7).double()
    got = measure_group_importance(module, [(inputs,)], squares, None)[UnitKind.EXPERT]
    expected, step = np.zeros((2, EXPERTS)), 1e-5
    layers = module.of_kind(UnitKind.EXPERT)
    for layer in range(2):
        for unit in range(EXPERTS):
            for sequence in inputs.split(1):
                losses = []
                for sign in (1, -1):
                    rows = [torch.ones(group.units, dtype=torch.float64) for group in module.groups]
                    rows[layers[layer]][unit] += sign * step
                    with torch.no_grad():
                        losses.append(float(squares(module.with_rows(sequence, rows=rows), ())))
                expected[layer, unit] += ((losses[0] - losses[1]) / (2 * step)) ** 2 / 3
    assert (expected > 1e-9).sum() >= EXPERTS
    assert np.allclose(got, expected, rtol=1e-6, atol=1e-12)
    module.select(Selection(CONTEXTS, {UnitKind.EXPERT: SOME}))
    masked = measure_group_importance(module, [(inputs,)], squares, 1)[UnitKind.EXPERT]
    assert not masked[~SOME[1]].any() and (masked[SOME[1]] > 0).any()


def test_gates_per_sequence_are_those_of_each_sequence_alone() -> None:
    module = two_mixtures()
    selection = Selection(CONTEXTS, {UnitKind.EXPERT: SOME})
    module.select(selection)
    x = hidden(3, 5, seed=8)
    rows = [gate.table[[2, 0, 1]].detach() for gate in module.group_gates]
    with torch.no_grad():
        together = module.with_rows(x, rows=rows)
        alone = [module(x[i : i + 1], context=torch.tensor(c)) for i, c in enumerate((2, 0, 1))]
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_recovery_leaves_experts_and_routers() -> None:
    module = two_mixtures()
    kept = {UnitKind.EXPERT: SOME, UnitKind.FFN: np.arange(4) < np.full((3, 2, 1), 2)}
    names = recover_least_squares(module, (hidden(6),), [*CONTEXTS] * 2, Selection(CONTEXTS, kept))
    assert names == ("0.shared.down.weight", "1.shared.down.weight")


@pytest.mark.slow
def test_fewer_experts_than_every_token_needs() -> None:
    module = two_mixtures()
    kept = SOME.copy()
    kept[1, 1, np.flatnonzero(kept[1, 1])[0]] = False
    with pytest.raises(UsageError, match="b keeps 1 of the 8 units of kind expert in 1, which needs 2 for every token"):
        module.select(Selection(CONTEXTS, {UnitKind.EXPERT: kept}))
    with torch.no_grad():
        module.group_gates[module.of_kind(UnitKind.EXPERT)[1]].table[1] = torch.eye(EXPERTS)[0]
    with pytest.raises(UsageError, match="1.router.weight routes every token to 2 of 8 experts, and only 1 of them"):
        freeze(capture_partitioned(module), 1)


def test_a_router_that_fails_leaves_torch_as_it_was() -> None:
    module = two_mixtures()
    with pytest.raises(RuntimeError), torch.no_grad():
        module(torch.zeros(1, 3, WIDTH + 1), context=torch.tensor(0))
    plain = nn.Linear(WIDTH, 4)
    assert torch.isfinite(plain(hidden())).all()
    assert torch.overrides._len_torch_function_stack() == 0


class Shared(Mixture):
    """The same layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


@pytest.mark.slow
def test_a_layer_that_is_called_twice() -> None:
    model = Shared()
    randomise(model, 3)
    module = partition(model, (hidden(),), contexts=3, dynamic_shapes=SHAPES, align=8)
    (group,) = (group for group in module.groups if group.kind is UnitKind.EXPERT)
    module(hidden(), context=torch.tensor(0))
    assert {name: count for (_, name), count in module.calls.items() if name in ("router", "experts")} == {
        "router": 2,
        "experts": 2,
    }
    selection = Selection(CONTEXTS, {UnitKind.EXPERT: chosen((3,), (2,), (4,))})
    module.select(selection)
    frozen = freeze(capture_partitioned(module), 0)
    assert [router.kept for router in frozen.routers] == [
        tuple(np.flatnonzero(chosen((3,), (2,), (4,))[0]).tolist())
    ] * 2
    assert sizes(frozen.model)["experts.up"] == 3 * WIDTH * 8
    assert module.parameter_kind(next(iter(group.parameters))) is UnitKind.EXPERT


class LogitsRead(Mixture):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        scores, numbers = logits.topk(PICKED)
        return self.shared(x + self.experts(x, numbers=numbers, weights=scores / logits.sum(-1, keepdim=True)))


class Sigmoid(Mixture):
    def forward(self, x: Tensor) -> Tensor:
        scores, numbers = self.router(x).sigmoid().topk(PICKED)
        return self.shared(x + self.experts(x, numbers=numbers, weights=scores))


class NumbersRead(Mixture):
    def forward(self, x: Tensor) -> Tensor:
        scores, numbers = self.router(x).topk(PICKED)
        return self.shared(x + self.experts(x, numbers=numbers, weights=scores) + numbers.sum(-1, keepdim=True))


class WeightsRead(Mixture):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.experts.up.mean()


class OneModule(Stacked):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = nn.Linear(WIDTH, EXPERTS), Feed()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        scores, numbers = self.router(x).topk(PICKED)
        return self.shared(x + super().forward(x, numbers=numbers, weights=torch.softmax(scores, dim=-1)))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (LogitsRead, "something other than topk reads the logits of linear in router"),
        (Sigmoid, "sigmoid is between the logits of the router and topk"),
        (NumbersRead, "sum reads the numbers of the experts for something other than looking up weights"),
        (WeightsRead, "mean reads experts.up, which is that of all experts"),
        (
            OneModule,
            "the model computes the numbers or weights of experts itself: let a module of its own take them",
        ),
    ],
)
def test_experts_that_cannot_be_gated(made: type[nn.Module], reason: str) -> None:
    model = made()
    randomise(model)
    module = partition(model, (hidden(),), dynamic_shapes=SHAPES, align=8)
    assert [group.name for group in module.groups] == ["shared"]
    assert any(r.channels == EXPERTS and r.reason.startswith(reason) for r in module.refused), module.refused
    assert_accounted(module)


def test_experts_sorted_by_number_are_refused_with_the_way_out() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")
    from cpcompile.partitioning.hugging_face import prepare_hugging_face

    ready = prepare_hugging_face(mixtral(transformers))
    ready.model.set_experts_implementation("grouped_mm")
    module = partition(ready.model, ready.example_inputs, forward=ready.forward, dynamic_shapes=ready.dynamic_shapes)
    assert {group.kind for group in module.groups} == {UnitKind.HEAD}
    refused = [refused for refused in module.refused if refused.channels == EXPERTS]
    assert len(refused) == 2
    assert all('choose set_experts_implementation("batched_mm")' in refused.reason for refused in refused)


def test_a_pretrained_decoder_sorts_its_experts() -> None:
    """Experts of one partition side by side: their weights, the router's rows and the gates move together."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'cpcompile[hf]'")
    from cpcompile.core.config import PretrainedConfig
    from cpcompile.partitioning.pretrained import PretrainedDecoder

    model = mixtral(transformers)
    randomise(model)
    settings = json.loads(model.config.to_json_string(use_diff=False))
    decoder = PretrainedDecoder(PretrainedConfig(settings=settings), contexts=3, model=model)
    selection = Selection(CONTEXTS, {UnitKind.EXPERT: SOME})
    decoder.partitioned.select(selection)
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = [decoder(ids, torch.tensor(context)) for context in range(3)]
        ordered = decoder.sort_units(selection)
        after = [decoder(ids, torch.tensor(context)) for context in range(3)]
    assert not np.array_equal(ordered.kept[UnitKind.EXPERT], SOME)
    for old, new in zip(before, after, strict=True):
        assert torch.allclose(old, new, rtol=0, atol=1e-5 * float(old.abs().max()))

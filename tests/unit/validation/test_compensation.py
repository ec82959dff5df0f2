"""Compensated parameters: what rounding them changes in products and in models, and that they round to themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from cpcompile.core.cache import OUTPUT
from cpcompile.core.config import PretrainedConfig, ValidateConfig
from cpcompile.core.probabilities import log_softmax
from cpcompile.core.rounding import SCHEMES, Scheme
from cpcompile.core.types import Array
from cpcompile.frontend.checkpoint import Checkpoint
from cpcompile.partitioning.pretrained import PretrainedDecoder
from cpcompile.validation.compensation import compensated, compensated_parameters
from cpcompile.validation.language_reference import LanguageReference
from tests.unit.passes.test_caches import PRETRAINED

FEW = SCHEMES["int4-weights"]


def correlated(rows: int, channels: int) -> Array:
    """Inputs that a few directions explain almost alone, of very different sizes."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((channels // 8, channels)) * rng.lognormal(size=channels)
    found: Array = rng.standard_normal((rows, channels // 8)) @ directions
    return found + 0.1 * rng.standard_normal((rows, channels))


def squares(inputs: Array) -> torch.Tensor:
    return torch.from_numpy(inputs.T @ inputs)


def change(inputs: Array, weight: Array, value: Array, scheme: Scheme) -> float:
    """The mean square of what rounding `value` changes in the outputs of `weight`."""
    return float(np.square(inputs @ (scheme.restored(value) - weight)).mean())


@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_changes_the_outputs_less(name: str) -> None:
    inputs, weight = correlated(2000, 96), np.random.default_rng(1).standard_normal((96, 24)).astype(np.float32)
    value = compensated(weight, squares(inputs[:1000]), SCHEMES[name])
    sizes = [change(inputs[1000:], weight, each, SCHEMES[name]) for each in (value, weight)]
    assert sizes[0] < 0.3 * sizes[1]


def test_a_value_rounds_to_itself_with_the_scales_of_the_original() -> None:
    """Blocks of zeros, ties, and channels without any input included."""
    rng = np.random.default_rng(2)
    weight = rng.integers(-5, 6, (96, 50)).astype(np.float32) * rng.lognormal(sigma=5, size=50).astype(np.float32)
    weight[32:64, :7] = 0
    inputs = correlated(40, 96)
    inputs[:, 10:20] = 0
    value = compensated(weight, squares(inputs), FEW)
    assert value.dtype == np.float32 and (value != FEW.restored(weight)).any()
    np.testing.assert_array_equal(FEW.restored(value), value)
    np.testing.assert_array_equal(FEW.round(value)[1], FEW.round(weight)[1])


def test_independent_inputs_of_one_size_leave_rounding_to_the_nearest() -> None:
    weight = np.random.default_rng(3).standard_normal((64, 9)).astype(np.float32)
    for same in (torch.eye(64), torch.zeros(64, 64)):
        np.testing.assert_array_equal(compensated(weight, same, FEW), FEW.restored(weight))


@pytest.mark.parametrize("kind", ["decoder", "gpt2"])
def test_a_model_of_compensated_parameters_stays_closer_to_the_exact_one(kind: str, checkpoint: Checkpoint) -> None:
    """GPT-2 has the inputs of its weights first. In text of few tokens, inputs depend on each other."""
    exact = checkpoint if kind == "decoder" else gpt2(checkpoint.contexts)
    first, second = exact.contexts
    names = [name for name, each in exact.model.named_parameters() if each.ndim == 2]
    names = [name for name in names if name not in exact.model.gate_tables() and "wpe" not in name]
    rounded, seen = {first: names[:-1], second: names}, list[tuple[int, int]]()
    found = compensated_parameters(referee(exact), rounded, FEW, steps=lambda *step: seen.append(step))
    assert found.keys() == set(names[1:]) and ("embed" in names[0] or "wte" in names[0])
    assert [done for done, _ in seen][-1] == seen[-1][1] and seen == sorted(seen)
    before, after = divergence(exact, exact, names[1:]), divergence(exact, having(exact, found), names[1:])
    assert after < 0.5 * before


def referee(checkpoint: Checkpoint) -> LanguageReference:
    """It has text of eight tokens."""
    text = {each: np.random.default_rng(0).integers(4, 12, 1000, dtype=np.int32) for each in checkpoint.contexts}
    return LanguageReference(checkpoint, None, ValidateConfig(), held_out=text, sequence=16)


def having(checkpoint: Checkpoint, values: Mapping[str, Array]) -> Checkpoint:
    """`checkpoint` with other values of some parameters."""
    return replace(checkpoint, state={**checkpoint.state, **{n: torch.from_numpy(each) for n, each in values.items()}})


def divergence(exact: Checkpoint, other: Checkpoint, rounded: Collection[str]) -> float:
    """KL(`exact` || `other` with its parameters `rounded`) in nats per token."""
    context, feeds = exact.contexts[-1], referee(exact).sample(exact.contexts[-1], 64, 16)
    own = log_softmax(referee(exact).masked(context)(feeds)[OUTPUT])
    run = referee(other).masked(context, dict.fromkeys(rounded, FEW), round_inputs=False)
    return float((np.exp(own) * (own - log_softmax(run(feeds)[OUTPUT]))).sum(axis=-1).mean())


def gpt2(contexts: tuple[str, ...]) -> Checkpoint:
    torch.manual_seed(0)
    config = PretrainedConfig(settings={"model_type": "gpt2", **PRETRAINED["gpt2"]})
    state = PretrainedDecoder(config, contexts=0).state_dict()
    return Checkpoint(config=config, state=state, contexts=contexts, tokenizer=Tokenizer(BPE()).to_str())

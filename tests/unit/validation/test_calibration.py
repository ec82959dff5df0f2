"""Calibrated parameters: what rounding changes in products and in models, and which parameters are calibrated."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from cpcompile.core.cache import INPUT, OUTPUT
from cpcompile.core.config import PretrainedConfig, ValidateConfig
from cpcompile.core.probabilities import log_softmax
from cpcompile.core.rounding import SCHEMES, UNCALIBRATED, Calibration, Rounded, Scheme, restored
from cpcompile.core.types import Array
from cpcompile.frontend.checkpoint import Checkpoint
from cpcompile.partitioning.pretrained import PretrainedDecoder
from cpcompile.validation.calibration import BATCH, READING, ROUNDING, calibrated, compensated
from cpcompile.validation.language_reference import LanguageReference
from cpcompile.validation.smoothing import ReadInputs
from tests.unit.passes.test_caches import PRETRAINED

FEW = SCHEMES["int4-weights"]


def correlated(rows: int, channels: int) -> Array:
    """Inputs that a few directions explain almost alone, of very different sizes."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((channels // 8, channels)) * rng.lognormal(size=channels)
    found: Array = rng.standard_normal((rows, channels // 8)) @ directions
    return found + 0.1 * rng.standard_normal((rows, channels))


def squares(inputs: Array) -> torch.Tensor:
    return torch.from_numpy((inputs.T @ inputs).astype(np.float32))


def change(inputs: Array, weight: Array, rounded: Rounded) -> float:
    """The mean square of what rounding changes in the outputs of `weight`."""
    return float(np.square(inputs @ (restored(rounded, np.float32) - weight)).mean())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_rounding_changes_the_outputs_less(scheme: Scheme) -> None:
    inputs, weight = correlated(2000, 96), np.random.default_rng(1).standard_normal((96, 24)).astype(np.float32)
    found, nearest = compensated(weight, squares(inputs[:1000]), scheme), scheme.round(weight)
    assert [(each.shape, each.dtype) for each in found[:2]] == [(each.shape, each.dtype) for each in nearest[:2]]
    half = 2 ** (scheme.bits - 1)
    assert -half <= found[0].min() and found[0].max() < half
    assert change(inputs[1000:], weight, found) < 0.3 * change(inputs[1000:], weight, nearest)


def test_blocks_of_zeros_and_channels_without_any_input_do_no_harm() -> None:
    rng = np.random.default_rng(2)
    weight = rng.integers(-5, 6, (96, 50)).astype(np.float32) * rng.lognormal(sigma=5, size=50).astype(np.float32)
    weight[32:64, :7] = 0
    inputs = correlated(40, 96)
    inputs[:, 10:20] = 0
    found = compensated(weight, squares(inputs), FEW)
    assert np.isfinite(found[1]).all() and change(inputs, weight, found) < change(inputs, weight, FEW.round(weight))
    assert np.isfinite(compensated(weight, torch.zeros(96, 96), FEW)[1]).all()


def test_an_outlier_is_clipped_where_its_input_is_small() -> None:
    """The other 31 numbers of the block gain more than it loses."""
    weight = np.random.default_rng(3).uniform(-1, 1, (32, 9)).astype(np.float32)
    weight[5] = 1.4
    inputs = torch.eye(32)
    inputs[5, 5] = 1e-4
    found, nearest = compensated(weight, inputs, FEW), FEW.round(weight)
    assert (np.abs(found[1]) < np.abs(nearest[1])).all()
    errors = [np.delete(restored(each, np.float32) - weight, 5, axis=0) for each in (found, nearest)]
    assert np.square(errors[0]).mean() < 0.8 * np.square(errors[1]).mean()


@pytest.mark.parametrize("kind", ["decoder", "gpt2"])
def test_a_calibrated_model_stays_closer_to_the_exact_one(kind: str, checkpoint: Checkpoint) -> None:
    """GPT-2 has the inputs of its weights first. In text of few tokens, inputs depend on each other."""
    exact = checkpoint if kind == "decoder" else gpt2(checkpoint.contexts)
    own = exact.model.parameter_sizes()
    names = [name for name, each in exact.model.named_parameters() if name in own and each.ndim == 2]
    texts = [referee(exact).sample(context, 64, 16)[INPUT] for context in exact.contexts]
    seen = list[tuple[str, int, int | None]]()
    batches = sum(-(-len(text) // BATCH) for text in texts)
    found = calibrated(exact.model, texts, [FEW], progress=lambda *step: seen.append(step))
    assert found.keys() == set(names)
    assert seen == sorted(seen) and {(READING, batches, batches), (ROUNDING, len(names), len(names))} <= set(seen)
    rounded = [name for name in names if "wpe" not in name]  # positions are not rounded
    assert divergence(exact, rounded, found) < 0.6 * divergence(exact, rounded)


def test_a_large_channel_does_not_cost_the_others(checkpoint: Checkpoint) -> None:
    """One channel of what an FFN multiplies is a thousand times as large as it was; its weights are as much smaller."""
    state = {name: tensor.clone() for name, tensor in checkpoint.state.items()}
    state["layers.0.ffn.up.weight"][7] *= 1000
    state["layers.0.ffn.down.weight"][:, 7] /= 1000
    uneven = replace(checkpoint, state=state)
    names = ["layers.0.ffn.down.weight", "layers.0.attention.query.weight", "layers.0.attention.key.weight"]
    texts = [referee(uneven).sample(context, 64, 16)[INPUT] for context in uneven.contexts]
    for scheme in (SCHEMES["int8"], SCHEMES["int7"]):
        found = calibrated(uneven.model, texts, [scheme], progress=lambda *_: None)
        factors = {name: found[name][scheme.name].factors for name in names}
        down, query, key = factors.values()
        assert down is not None and down.argmin() == 7 and down[7] < 0.1 * np.median(down)
        assert query is key
        near, smooth = (divergence(uneven, names[:1], each, scheme, inputs=True) for each in (UNCALIBRATED, found))
        assert smooth < 0.1 * near


def test_factors_of_channels_without_any_input_are_finite() -> None:
    read = ReadInputs()
    read.add(torch.zeros(2, 3, 4))
    np.testing.assert_array_equal(read.factors(lambda _: 0.0), np.ones(4))
    read.add(torch.tensor([[[0.0, 1.0, -2.0, 400.0]]]))
    read.add_gradient(torch.ones(1, 1, 4))
    factors = read.factors(lambda _: 0.0)
    assert np.isfinite(factors).all() and factors.max() / factors.min() <= 400 / 0.02 * 1.01


def referee(checkpoint: Checkpoint, calibration: Calibration = UNCALIBRATED) -> LanguageReference:
    """It has text of eight tokens."""
    text = {each: np.random.default_rng(0).integers(4, 12, 1000, dtype=np.int32) for each in checkpoint.contexts}
    config = ValidateConfig()
    return LanguageReference(checkpoint, None, config, held_out=text, sequence=16, calibration=calibration)


def divergence(
    checkpoint: Checkpoint,
    names: Collection[str],
    calibration: Calibration = UNCALIBRATED,
    scheme: Scheme = FEW,
    *,
    inputs: bool = False,
) -> float:
    """KL(exact || with the parameters `names`, and perhaps the inputs of their products, rounded) in nats per token."""
    context, reference = checkpoint.contexts[-1], referee(checkpoint, calibration)
    feeds = reference.sample(context, 64, 16)
    exact = log_softmax(reference.masked(context)(feeds)[OUTPUT])
    run = reference.masked(context, dict.fromkeys(names, scheme), round_inputs=inputs)
    return float((np.exp(exact) * (exact - log_softmax(run(feeds)[OUTPUT]))).sum(axis=-1).mean())


def gpt2(contexts: tuple[str, ...]) -> Checkpoint:
    torch.manual_seed(0)
    config = PretrainedConfig(settings={"model_type": "gpt2", **PRETRAINED["gpt2"]})
    state = PretrainedDecoder(config, contexts=0).state_dict()
    return Checkpoint(config=config, state=state, contexts=contexts, tokenizer=Tokenizer(BPE()).to_str())

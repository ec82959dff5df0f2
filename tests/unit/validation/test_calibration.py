"""Calibrated parameters: what rounding changes in products and in models, and which parameters are calibrated."""

from __future__ import annotations

from collections.abc import Collection

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
from cpcompile.validation.calibration import READING, ROUNDING, calibrated, compensated
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
    return torch.from_numpy((inputs.T @ inputs).astype(np.float32))


def change(inputs: Array, weight: Array, rounded: Rounded) -> float:
    """The mean square of what rounding changes in the outputs of `weight`."""
    return float(np.square(inputs @ (restored(rounded, np.float32) - weight)).mean())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_rounding_changes_the_outputs_less(scheme: Scheme) -> None:
    inputs, weight = correlated(2000, 96), np.random.default_rng(1).standard_normal((96, 24)).astype(np.float32)
    found, nearest = compensated(weight, squares(inputs[:1000]), scheme), scheme.round(weight)
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in nearest]
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
    found = calibrated(exact.model, texts, FEW, progress=lambda *step: seen.append(step))
    assert found.keys() == set(names)
    assert seen == sorted(seen) and {(READING, 8, 8), (ROUNDING, len(names), len(names))} <= set(seen)
    calibration = {name: {FEW.name: rounded} for name, rounded in found.items()}
    rounded = [name for name in names if "wpe" not in name]  # positions are not rounded
    assert divergence(exact, rounded, calibration) < 0.6 * divergence(exact, rounded)


def referee(checkpoint: Checkpoint, calibration: Calibration = UNCALIBRATED) -> LanguageReference:
    """It has text of eight tokens."""
    text = {each: np.random.default_rng(0).integers(4, 12, 1000, dtype=np.int32) for each in checkpoint.contexts}
    config = ValidateConfig()
    return LanguageReference(checkpoint, None, config, held_out=text, sequence=16, calibration=calibration)


def divergence(checkpoint: Checkpoint, names: Collection[str], calibration: Calibration = UNCALIBRATED) -> float:
    """KL(exact || with the parameters `names` rounded) in nats per token."""
    context, reference = checkpoint.contexts[-1], referee(checkpoint, calibration)
    feeds = reference.sample(context, 64, 16)
    exact = log_softmax(reference.masked(context)(feeds)[OUTPUT])
    run = reference.masked(context, dict.fromkeys(names, FEW), round_inputs=False)
    return float((np.exp(exact) * (exact - log_softmax(run(feeds)[OUTPUT]))).sum(axis=-1).mean())


def gpt2(contexts: tuple[str, ...]) -> Checkpoint:
    torch.manual_seed(0)
    config = PretrainedConfig(settings={"model_type": "gpt2", **PRETRAINED["gpt2"]})
    state = PretrainedDecoder(config, contexts=0).state_dict()
    return Checkpoint(config=config, state=state, contexts=contexts, tokenizer=Tokenizer(BPE()).to_str())

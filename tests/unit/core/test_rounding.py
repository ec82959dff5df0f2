"""Rounded weights: near the originals, independent of what is cut, and what the operators of the standard give back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cpcompile.core.rounding import BLOCK, SCHEMES, Scheme, restored

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((96, 10)).astype(np.float32)
WEIGHT[:, 3] = 0


def nearest(scheme: Scheme, weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`weight` as an engine has it, in its type."""
    return restored(scheme.round(weight), weight.dtype)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_every_element_is_within_half_a_step(scheme: Scheme) -> None:
    numbers, scale, _ = scheme.round(WEIGHT)
    blocks = WEIGHT.reshape(-1, scheme.block or 96, 10)
    assert numbers.dtype == np.int8 and numbers.shape == blocks.shape
    assert abs(numbers.astype(int)).max() <= 2 ** (scheme.bits - 1)
    error = np.abs(numbers * scale - blocks) / np.abs(scale)
    # The end of the range opposite to the farthest element is one step nearer: the last half of it is clipped.
    assert error.max() <= (0.5 if scheme.bits == 8 else 1) + 1e-4
    assert (numbers[..., 3] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_what_is_cut_between_blocks_is_rounded_as_in_the_whole(scheme: Scheme) -> None:
    kept = np.r_[0:BLOCK, 2 * BLOCK : 3 * BLOCK]
    whole = nearest(scheme, WEIGHT)
    np.testing.assert_array_equal(nearest(scheme, WEIGHT[:, [0, 7]]), whole[:, [0, 7]])
    if scheme.block is not None:
        np.testing.assert_array_equal(nearest(scheme, WEIGHT[kept]), whole[kept])
    assert nearest(scheme, WEIGHT.astype(np.float64)).dtype == np.float64


def test_four_bits_use_all_sixteen_numbers() -> None:
    ramp = np.linspace(-1, 0.875, 16, dtype=np.float32).repeat(2)[:, None]
    numbers, scale, _ = SCHEMES["int4-weights"].round(ramp)
    assert sorted(set(numbers.flatten().tolist())) == list(range(-8, 8)) and scale.item() == 0.125
    np.testing.assert_array_equal(nearest(SCHEMES["int4-weights"], ramp), ramp)


def test_blocks_have_to_be_whole() -> None:
    assert SCHEMES["int8"].fits(33) and SCHEMES["int4-weights"].fits(64) and not SCHEMES["int4-weights"].fits(33)

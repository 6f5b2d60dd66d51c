"""Conversions between types: as ml_dtypes and numpy have them, and nothing becomes infinite in silence."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_boost.checkpoint.casting import cast, survives
from llm_boost.errors import CheckpointError

TYPES = [np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)]


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(TYPES), st.sampled_from(TYPES))
def test_as_the_libraries_round(seed, source, target):
    """Random bits: subnormals, ties, both infinities, NaN of every kind."""
    array = np.random.default_rng(seed).integers(0, 2**32, 2000, np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        array = array.astype(source)
        wanted = array.astype(np.float32).astype(target)
    beyond = np.isfinite(array.astype(np.float32)) & ~np.isfinite(wanted.astype(np.float32))
    got = cast(array[~beyond], target, "t")
    nan = np.isnan(got.astype(np.float32))
    np.testing.assert_array_equal(nan, np.isnan(array[~beyond].astype(np.float32)))
    np.testing.assert_array_equal(bits(got)[~nan], bits(wanted[~beyond])[~nan])
    if beyond.any():
        with pytest.raises(
            CheckpointError, match=rf"t: {beyond.sum()} values, up to .* are beyond {target.name}"
        ):
            cast(array, target, "t")


def test_ties_go_to_the_even_neighbour():
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8], np.float32)
    np.testing.assert_array_equal(cast(ties, TYPES[2], "t").astype(np.float32), [1, 1 + 2**-6, -1])
    ties = np.array([1 + 2**-11, 1 + 3 * 2**-11], np.float32)
    np.testing.assert_array_equal(cast(ties, TYPES[1], "t").astype(np.float32), [1, 1 + 2**-9])


def test_what_overflows_is_named_and_infinity_stays():
    big = np.array([1, 70000, -1e9, np.inf], np.float32)
    with pytest.raises(CheckpointError) as caught:
        cast(big, TYPES[1], "m: tensor a")
    assert str(caught.value) == (
        "m: tensor a: 2 values, up to 1e+09, are beyond float16, whose largest is 65504; choose bf16 or fp32"
    )
    np.testing.assert_array_equal(cast(big[[0, 3]], TYPES[1], "a"), [1, np.inf])
    assert not survives(big, TYPES[1])
    assert not survives(np.float32([1.001]), TYPES[2])
    assert survives(np.float32([1.5, -0.0, np.inf]), TYPES[2])

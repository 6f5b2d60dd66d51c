"""Rounding with feedback: against plain numpy, against round-to-nearest, and into the packed layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_boost import _native
from llm_boost.quantize.gptq import (
    GROUP,
    WEIGHT_GROUP,
    Rounder,
    hadamard,
    pack,
    rotate,
    rotate_hessian,
    upper_factor,
)

FORMATS = ("int4", "int6", "int8")
LEVELS = {
    "int4": np.array(_native.INT4_CODEBOOK, np.float64) - 128,
    "int6": 4.0 * np.arange(-32, 32),
    "int8": np.array([np.inf, *range(-127, 128)]),  # 0 stands for nothing
}


def correlated_inputs(rng: np.random.Generator, tokens: int, cols: int) -> np.ndarray:
    """Inputs that share a few directions, as a network's do."""
    shared = rng.standard_normal((tokens, 8)) @ rng.standard_normal((8, cols))
    return (shared + 0.3 * rng.standard_normal((tokens, cols))).astype(np.float32)


def output_error(inputs: np.ndarray, weights: np.ndarray, rounded: np.ndarray) -> float:
    return float(np.square(inputs @ (weights - rounded).T).sum())


@given(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_less_reaches_the_outputs_than_of_round_to_nearest(
    fmt: str, rows: int, groups: int, seed: int
) -> None:
    rng, cols = np.random.default_rng(seed), groups * GROUP
    inputs = correlated_inputs(rng, 500, cols)
    weights = rng.standard_normal((rows, cols)).astype(np.float32)
    rounder = Rounder(rotate_hessian(inputs.T @ inputs / len(inputs)), 0.001, threads=2)
    packed = pack(rounder.round(rotate(weights) / np.float32(GROUP), fmt), fmt)
    assert len(packed) == _native.packed_bytes(fmt, rows, cols)
    calibrated = _native.unpack_rows(packed, fmt, rows, cols)
    nearest = _native.unpack_rows(_native.pack_matrix([weights], fmt), fmt, rows, cols)
    assert output_error(inputs, weights, calibrated) < 0.6 * output_error(inputs, weights, nearest)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_packed_bytes_are_the_weights(fmt: str) -> None:
    rng = np.random.default_rng(0)
    inputs, weights = correlated_inputs(rng, 300, 2 * GROUP), rng.standard_normal((37, 2 * GROUP))
    rounder = Rounder(rotate_hessian(inputs.T @ inputs), 0.01, threads=1)
    rounded = rounder.round(rotate(weights.astype(np.float32)), fmt)
    unpacked = _native.unpack_rows(pack(rounded, fmt), fmt, 48, 2 * GROUP)
    np.testing.assert_allclose(rotate(rounded.weights), unpacked, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_column_takes_the_level_that_the_columns_before_it_ask_for(fmt: str) -> None:
    """The slow way: one row and one column at a time, in float64, with the scales that were chosen."""
    rng, cols, size = np.random.default_rng(1), 2 * GROUP, WEIGHT_GROUP[fmt]
    inputs = correlated_inputs(rng, 400, cols)
    factor = upper_factor(inputs.T @ inputs / len(inputs) + 0.01 * np.eye(cols, dtype=np.float32))
    weights = rng.standard_normal((16, cols)).astype(np.float32)
    carried = rng.standard_normal((16, cols)).astype(np.float32)
    row_scale = np.full(16, 0.0005, np.float32)
    values, codes = np.empty((16, cols), np.uint8), np.empty((16, cols // size), np.int8)
    error = np.empty((16, cols), np.float32)
    _native.round_columns(fmt, weights, carried, factor, row_scale, values, codes, error, 2)
    wide = factor.astype(np.float64)
    for r in range(16):
        reached = carried[r].astype(np.float64)
        for k in range(cols):
            scale = float(row_scale[r]) * float(codes[r, k // size])
            wanted = weights[r, k] + reached[k] / wide[k, k]
            distance = np.abs(wanted - scale * LEVELS[fmt])
            chosen = int(values[r, k])
            assert distance[chosen] <= distance.min() + 1e-4 * abs(scale) * 127, (r, k)
            off = weights[r, k] - scale * LEVELS[fmt][chosen]
            assert error[r, k] == pytest.approx(off, abs=1e-5)
            reached += off * wide[k]


def test_without_correlation_it_is_round_to_nearest() -> None:
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((64, 4 * GROUP)).astype(np.float32)
    rounded = Rounder(np.eye(4 * GROUP, dtype=np.float32), 0.0, threads=2).round(rotate(weights), "int4")
    nearest = _native.unpack_rows(_native.pack_matrix([weights], "int4"), "int4", *weights.shape)
    ours = np.square(rotate(rounded.weights) / GROUP - weights).mean()
    assert ours == pytest.approx(np.square(nearest - weights).mean(), rel=0.01)


def test_factor_and_rotation() -> None:
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((200, 2 * GROUP)).astype(np.float32)
    hessian = inputs.T @ inputs
    factor = upper_factor(hessian)
    np.testing.assert_array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor @ factor.T, hessian, atol=0.01)
    turned = (inputs.reshape(-1, GROUP) @ hadamard()).reshape(inputs.shape)
    np.testing.assert_allclose(rotate_hessian(hessian), turned.T @ turned, atol=0.5)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_fewer_tokens_than_columns(tokens: int) -> None:
    """The Hessian then is singular; damping makes up for it."""
    rng = np.random.default_rng(4)
    inputs = rng.standard_normal((tokens, GROUP)).astype(np.float32)
    weights = rng.standard_normal((16, GROUP)).astype(np.float32)
    rounded = Rounder(rotate_hessian(inputs.T @ inputs), 0.0, threads=1).round(rotate(weights), "int4")
    assert np.square(rotate(rounded.weights) / GROUP - weights).mean() < 0.3


def test_rows_of_zeros_stay_zeros() -> None:
    weights = np.zeros((20, GROUP), np.float32)
    weights[3] = 1
    rounded = Rounder(np.eye(GROUP, dtype=np.float32), 0.01, threads=1).round(weights, "int4")
    unpacked = _native.unpack_rows(pack(rounded, "int4"), "int4", 20, GROUP)
    assert not unpacked[[i for i in range(20) if i != 3]].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "bfloat16", "codes": (16, 1)}, "only int8, int6 and int4"),
        ({"rows": 15}, "multiple of 16"),
        ({"carried": (16, 32)}, r"carried is \[16, 32\], not \[16, 64\]"),
        ({"factor": (32, 64)}, r"factor is \[32, 64\], not \[64, 64\]"),
        ({"codes": (16, 1)}, r"codes is \[16, 1\], not \[16, 2\]"),
        ({"row_scale": 8}, "row_scale must have a number a row"),
    ],
)
def test_shapes_are_checked(change: dict, message: str) -> None:
    rows = change.get("rows", 16)
    arguments = (
        change.get("format", "int4"),
        np.zeros((rows, 64), np.float32),
        np.zeros(change.get("carried", (rows, 64)), np.float32),
        np.zeros(change.get("factor", (64, 64)), np.float32),
        np.zeros(change.get("row_scale", rows), np.float32),
        np.zeros((rows, 64), np.uint8),
        np.zeros(change.get("codes", (rows, 2)), np.int8),
        np.zeros((rows, 64), np.float32),
    )
    with pytest.raises(ValueError, match=message):
        _native.round_columns(*arguments)

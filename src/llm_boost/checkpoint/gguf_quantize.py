"""float32 becomes blocks of Q8_0 and Q4_0, to the bit as ggml's reference makes them (ggml-quants.c).

A block is 32 consecutive elements of a row: a float16 scale, then the integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
FloatArray = NDArray[np.float32]

BLOCK = 32
CHUNK_BLOCKS = 1 << 13  # at a time, so that temporaries stay within the cache


def quantize(rows: FloatArray, kind: str) -> Bytes:
    """[rows, cols] -> [rows, bytes]; `cols` is a multiple of 32, `kind` is Q8_0 or Q4_0."""
    encode = {"Q8_0": _q8_0, "Q4_0": _q4_0}[kind]
    blocks = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1, BLOCK)
    parts = [encode(blocks[at : at + CHUNK_BLOCKS]) for at in range(0, len(blocks), CHUNK_BLOCKS)]
    return np.concatenate(parts).reshape(rows.shape[0], -1)


def _q8_0(blocks: FloatArray) -> Bytes:
    """The largest magnitude is 127 steps; halves round away from zero, as C's roundf."""
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    steps = blocks * _inverse(scale)
    codes = np.trunc(np.abs(steps).astype(np.float64) + 0.5) * np.sign(steps)
    return np.concatenate([_half(scale), codes.astype(np.int8).view(np.uint8)], axis=1)


def _q4_0(blocks: FloatArray) -> Bytes:
    """The value of largest magnitude is -8 steps. One rounding of product and sum, as a fused one has."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = largest / np.float32(-8)
    steps = blocks.astype(np.float64) * _inverse(scale).astype(np.float64) + 8.5
    codes = np.minimum(np.trunc(steps.astype(np.float32)), 15).astype(np.uint8)
    return np.concatenate([_half(scale), codes[:, :16] | codes[:, 16:] << np.uint8(4)], axis=1)


def _inverse(scale: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _half(scale: FloatArray) -> Bytes:
    with np.errstate(over="ignore"):
        half: NDArray[Any] = scale.astype(np.float16)
    return half.view(np.uint8)

"""Slow, obvious numpy versions of what csrc/layout.h and the kernels promise."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llm_boost import _native

GROUP = _native.GROUP
CODEBOOK = np.array(_native.INT4_CODEBOOK, dtype=np.int32)
BLOCK = 16
WEIGHT_GROUP = {"int8": 64, "int6": 64, "int4": 32}


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def padded_cols(fmt: str, cols: int) -> int:
    return {"float32": cols, "bfloat16": round_up(cols, 2)}.get(fmt, round_up(cols, GROUP))


def random_packed(fmt: str, rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """Any bytes of the layout, with sane scales and zeros in the padding columns."""
    blocks, k = round_up(rows, BLOCK) // BLOCK, padded_cols(fmt, cols)
    if fmt in ("float32", "bfloat16"):
        dtype = np.float32 if fmt == "float32" else ml_dtypes.bfloat16
        per_step = 4 // np.dtype(dtype).itemsize
        w = rng.standard_normal((blocks, BLOCK, k)).astype(dtype)
        w[:, :, cols:] = 0
        steps = w.reshape(blocks, BLOCK, k // per_step, per_step).transpose(0, 2, 1, 3)
        return np.frombuffer(steps.tobytes(), np.uint8)
    groups = k // WEIGHT_GROUP[fmt]
    scales = rng.uniform(0.001, 0.01, (blocks, BLOCK)).astype(np.float32)
    codes = rng.integers(-127, 128, (blocks, groups, BLOCK), dtype=np.int8).view(np.uint8)
    bits = {"int8": 256, "int6": 64, "int4": 16}[fmt]
    q = rng.integers(fmt == "int8", bits, (blocks, BLOCK, k), dtype=np.uint8)
    steps = q.reshape(blocks, BLOCK, k // 4, 4).transpose(0, 2, 1, 3)  # [blocks][steps][16][4]
    pad = np.zeros(round_up(groups * BLOCK, 64) - groups * BLOCK, np.uint8)
    parts = []
    for b in range(blocks):
        parts += [scales[b].view(np.uint8), codes[b].ravel(), pad, _values(steps[b], fmt)]
    return np.concatenate(parts)


def _nibbles(steps: np.ndarray) -> np.ndarray:
    return (steps[0::2] & 15) | ((steps[1::2] & 15) << 4)


def _values(steps: np.ndarray, fmt: str) -> np.ndarray:
    """The bytes of one block's values, of [steps][16][4]."""
    if fmt == "int8":
        return steps.ravel()
    if fmt == "int4":
        return _nibbles(steps).ravel()
    groups = []
    for g in range(0, len(steps), 16):
        group = steps[g : g + 16]
        high = group >> 4
        pairs = high[0::4] | (high[1::4] << 2) | (high[2::4] << 4) | (high[3::4] << 6)
        groups += [_nibbles(group).ravel(), pairs.ravel()]
    return np.concatenate(groups)


def unpack(packed: np.ndarray, fmt: str, rows: int, cols: int) -> np.ndarray:
    """The weights that packed bytes stand for, float64 [rows][padded columns]."""
    blocks, k = round_up(rows, BLOCK) // BLOCK, padded_cols(fmt, cols)
    data = packed.reshape(blocks, -1)
    if fmt in ("float32", "bfloat16"):
        dtype = np.float32 if fmt == "float32" else ml_dtypes.bfloat16
        per_step = 4 // np.dtype(dtype).itemsize
        w = data.reshape(-1).view(dtype).reshape(blocks, k // per_step, BLOCK, per_step)
        return w.transpose(0, 2, 1, 3).reshape(blocks * BLOCK, k)[:rows, :cols].astype(np.float64)
    group = WEIGHT_GROUP[fmt]
    groups = k // group
    header = 64 + round_up(groups * BLOCK, 64)
    scales = np.ascontiguousarray(data[:, :64]).view(np.float32).astype(np.float64)
    codes = data[:, 64 : 64 + groups * BLOCK].view(np.int8).reshape(blocks, groups, BLOCK).transpose(0, 2, 1)
    body = data[:, header:]
    if fmt == "int8":
        steps = body.reshape(blocks, k // 4, BLOCK, 4).astype(np.int32)
    elif fmt == "int4":
        half = body.reshape(blocks, k // 8, BLOCK, 4)
        steps = CODEBOOK[np.stack([half & 15, half >> 4], axis=2).reshape(blocks, k // 4, BLOCK, 4)]
    else:
        vectors = body.reshape(blocks, k // 64, 12, BLOCK, 4)
        nibbles, pairs = vectors[:, :, :8], vectors[:, :, 8:]
        low = np.stack([nibbles & 15, nibbles >> 4], axis=3).reshape(blocks, k // 64, 16, BLOCK, 4)
        high = np.stack([(pairs >> (2 * j)) & 3 for j in range(4)], axis=3).reshape(
            blocks, k // 64, 16, BLOCK, 4
        )
        steps = 4 * (low.astype(np.int32) + 16 * high).reshape(blocks, k // 4, BLOCK, 4)
    values = (steps.transpose(0, 2, 1, 3).reshape(blocks, BLOCK, groups, group) - 128).astype(np.float64)
    w = (values * codes[..., None] * scales[:, :, None, None]).reshape(blocks * BLOCK, -1, GROUP)
    return (w @ hadamard(GROUP)).reshape(blocks * BLOCK, k)[:rows]


def hadamard(n: int) -> np.ndarray:
    """Sylvester's matrix [n][n], entries 1 and -1."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def transform(x: np.ndarray) -> np.ndarray:
    """x @ hadamard in float32, in the kernels' order of additions, so that borders between levels agree."""
    h = 1
    while h < x.shape[-1]:
        pairs = x.reshape(*x.shape[:-1], -1, 2, h)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).reshape(
            x.shape
        )
        h *= 2
    return x


def round_activations(x: np.ndarray, fmt: str) -> np.ndarray:
    """x as the kernels see it beside weights of `fmt`, float64 [tokens][columns, padded where quantised]."""
    if fmt == "float32":
        return x.astype(np.float64)
    if fmt == "bfloat16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)
    tokens, cols = x.shape
    padded = np.zeros((tokens, round_up(cols, GROUP)), np.float32)
    padded[:, :cols] = x
    groups = transform(padded.reshape(tokens, -1, GROUP))
    peak = np.abs(groups).max(axis=-1, keepdims=True)
    inverse = np.where(peak > 1e-30, np.float32(127) / np.where(peak > 0, peak, 1), np.float32(0)).astype(
        np.float32
    )
    q = np.rint(groups * inverse)
    rounded = q.astype(np.float64) * (peak / np.float32(127))
    return (rounded @ hadamard(GROUP) / GROUP).reshape(tokens, -1)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return (x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight).astype(np.float32)


def silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))

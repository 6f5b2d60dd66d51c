"""The decoder's arithmetic in float32 numpy, as csrc/kernels.cpp computes it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llm_boost.models.packing import BLOCK_ROWS

Floats = NDArray[np.float32]


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Over the last axis."""
    scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(eps))
    normed: Floats = x * scale * weight
    return normed


def silu_mul(x: Floats) -> Floats:
    """silu(gate) * up, whose columns alternate in blocks of 16: [tokens, 2 * width] to [tokens, width]."""
    pairs = x.reshape(len(x), -1, 2, BLOCK_ROWS)
    gate, up = pairs[:, :, 0], pairs[:, :, 1]
    with np.errstate(over="ignore"):
        inner: Floats = gate / (1 + np.exp(-gate)) * up
    return inner.reshape(len(x), -1)


def rotary(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """x [heads, length, head_dim], its halves turned against each other; cos, sin [length, head_dim / 2]."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
    """Causal and grouped: q [heads, length, head_dim], k and v of fewer heads; [length, heads * head_dim]."""
    heads, length, head_dim = q.shape
    grouped: Floats = (q * np.float32(scale)).reshape(len(k), -1, head_dim)
    scores = (grouped @ k.swapaxes(1, 2)).reshape(heads, length, length)
    scores += np.triu(np.full((length, length), -np.inf, np.float32), 1)
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    attended = scores.reshape(len(k), -1, length) @ np.ascontiguousarray(v)
    return attended.reshape(heads, length, head_dim).swapaxes(0, 1).reshape(length, -1)

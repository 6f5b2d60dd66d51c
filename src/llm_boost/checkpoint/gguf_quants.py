"""GGUF's quantised blocks become float32, in vectorised numpy.

Formats as ggml defines them (ggml-common.h, ggml-quants.c): a block of 32 or 256 consecutive elements of a
row holds its scales and its packed integers. Products are taken in the reference's order, so that results
equal its own to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
FloatArray = NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 18  # decoded at a time: temporaries stay within the cache, and small beside any tensor


@dataclass(frozen=True)
class BlockType:
    """`size` elements in `bytes` bytes; `decode` takes [blocks, bytes] to [blocks, size]."""

    size: int
    bytes: int
    decode: Callable[[Bytes], FloatArray]


def dequantize(blocks: Bytes, kind: BlockType) -> FloatArray:
    """Flat float32 of flat `blocks`, a whole number of them."""
    rows = blocks.reshape(-1, kind.bytes)
    out = np.empty((len(rows), kind.size), dtype=np.float32)
    step = CHUNK_ELEMENTS // kind.size
    with np.errstate(invalid="ignore"):  # an infinite scale of a damaged block makes nan, as in the reference
        for start in range(0, len(rows), step):
            out[start : start + step] = kind.decode(rows[start : start + step])
    return out.reshape(-1)


def _half(blocks: Bytes, at: int) -> FloatArray:
    """The float16 at byte `at` of every block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """The low halves of a block's bytes, then the high halves: [blocks, n] -> [blocks, 2n]."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """32 bits at byte `at`, one an element, in place as bit 4: [blocks, 32]."""
    return np.unpackbits(blocks[:, at : at + 4], axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> FloatArray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8))


def _q4_1(blocks: Bytes) -> FloatArray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> FloatArray:
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (quants.view(np.int8) - np.int8(16))


def _q5_1(blocks: Bytes) -> FloatArray:
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * quants + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> FloatArray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _k_scales(blocks: Bytes) -> tuple[FloatArray, FloatArray]:
    """Scale and offset of the 8 groups of a Q4_K or Q5_K block, [blocks, 8, 1] each.

    12 bytes hold 8 scales and 8 minima of 6 bits: bytes 0-3 and 4-7 the first four of each, whose upper two
    bits belong to the last four, the rest of which bytes 8-11 hold.
    """
    first, second, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (last & 15) | (first >> 6 << 4)], axis=-1)
    minima = np.concatenate([second & 63, (last >> 4) | (second >> 6 << 4)], axis=-1)
    return (_half(blocks, 0) * scales)[:, :, None], (_half(blocks, 2) * minima)[:, :, None]


def _q4_k(blocks: Bytes) -> FloatArray:
    scales, minima = _k_scales(blocks)
    quants = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (scales * quants - minima).reshape(-1, 256)


def _q5_k(blocks: Bytes) -> FloatArray:
    scales, minima = _k_scales(blocks)
    quants = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (blocks[:, None, 16:48] >> shifts & 1) << 4
    return (scales * (quants | fifth) - minima).reshape(-1, 256)


def _q6_k(blocks: Bytes) -> FloatArray:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3) << 4
    quants = (low | high.reshape(-1, 8, 32)).view(np.int8) - np.int8(32)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return (scales[:, :, None] * quants.reshape(-1, 16, 16)).reshape(-1, 256)


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
}

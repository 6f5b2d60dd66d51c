"""GPTQ in the engine's own packed formats: columns make up for the rounding of those before them.

Frantar et al., "GPTQ", 2023, in the equivalent form of LDLQ (Chee et al., "QuIP", 2023): with H = U U^T the
Hessian of the inputs, U upper triangular, and e = w - q a row's error, what the error does to the outputs is
e H e^T = |e U|^2, and entry k of e U depends on columns up to k alone. Inputs and weights are rotated as the
kernels rotate them (csrc/layout.h): the Hessian is that of the rotated inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm_boost import _native

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

GROUP = _native.GROUP
BLOCK_ROWS = 16
BLOCK_COLS = 128  # columns between two products with the factor
WEIGHT_GROUP = {"int8": 64, "int6": 64, "int4": 32}  # columns that share a scale code
SCALE_HEADROOM = 1.1  # updated weights may want larger scales than the first ones, from which row scales come


@dataclass(frozen=True)
class Quantized:
    """A matrix on the format's grid: values [rows, cols] as stored, codes [rows, groups], row_scale [rows].

    Rows are padded to whole blocks, columns to whole groups; `weights` are dequantised and still rotated.
    """

    values: Bytes
    codes: NDArray[np.int8]
    row_scale: Floats
    weights: Floats


def hadamard(order: int = GROUP) -> Floats:
    """Sylvester's matrix, entries 1 and -1."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def pad_columns(x: Floats) -> Floats:
    """[n, cols] with zeros up to a multiple of GROUP."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))) if x.shape[1] % GROUP else x


def rotate(x: Floats) -> Floats:
    """Each GROUP columns of [n, cols] times the Walsh-Hadamard matrix."""
    return (x.reshape(-1, GROUP) @ hadamard()).reshape(x.shape)


def rotate_hessian(hessian: Floats) -> Floats:
    """The Hessian of rotated inputs, from that of the inputs: [cols, cols]."""
    return rotate(np.ascontiguousarray(rotate(hessian).T))


def upper_factor(hessian: Floats) -> Floats:
    """U, upper triangular, with U U^T = hessian: the Cholesky factor of the matrix read backwards."""
    lower = np.linalg.cholesky(np.ascontiguousarray(hessian[::-1, ::-1]))
    return np.ascontiguousarray(lower[::-1, ::-1])


class Rounder:
    """Rounds matrices for one kind of inputs; rows are independent, so a large matrix may come in parts.

    Args:
        hessian: of the rotated inputs, [cols, cols]; cols is a multiple of GROUP.
        damping: the share of the mean of its diagonal that is added to the diagonal, and doubled until the
            matrix is positive definite.
    """

    def __init__(self, hessian: Floats, damping: float, threads: int) -> None:
        self._threads = threads
        # The groups with the largest inputs come first: they are made up for by the most columns.
        energy = np.diag(hessian).reshape(-1, GROUP).sum(axis=1)
        self._groups = np.argsort(-energy, kind="stable")
        self._order = _columns_of(self._groups, GROUP)
        self._factor = _damped_factor(hessian[self._order][:, self._order], damping)

    def round(self, weights: Floats, fmt: str) -> Quantized:
        """Rotated `weights` [rows, cols] on the grid of `fmt`."""
        rows, cols, size = -(-len(weights) // BLOCK_ROWS) * BLOCK_ROWS, weights.shape[1], WEIGHT_GROUP[fmt]
        ordered = np.zeros((rows, cols), np.float32)
        ordered[: len(weights)] = weights[:, self._order]
        row_scale = row_scales(weights, fmt, self._threads) * np.float32(SCALE_HEADROOM)
        values, codes = np.empty((rows, cols), np.uint8), np.empty((rows, cols // size), np.int8)
        error = np.empty((rows, cols), np.float32)
        for block in (slice(i, min(i + BLOCK_COLS, cols)) for i in range(0, cols, BLOCK_COLS)):
            groups = slice(block.start // size, block.stop // size)
            rounded = values[:, block].copy(), codes[:, groups].copy(), error[:, block].copy()
            _native.round_columns(
                fmt,
                ordered[:, block].copy(),
                error[:, : block.start] @ self._factor[: block.start, block],
                self._factor[block, block].copy(),
                row_scale,
                *rounded,
                threads=self._threads,
            )
            values[:, block], codes[:, groups], error[:, block] = rounded
        ordered -= error
        columns, codes_back = np.argsort(self._order), np.argsort(_columns_of(self._groups, GROUP // size))
        return Quantized(values[:, columns], codes[:, codes_back], row_scale, ordered[:, columns])


def _columns_of(groups: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The members of groups of `size`."""
    return (groups[:, None] * size + np.arange(size)).reshape(-1)


def _damped_factor(hessian: Floats, damping: float) -> Floats:
    """The upper factor of the Hessian with something added to its diagonal."""
    mean = max(float(np.diag(hessian).mean()), float(np.finfo(np.float32).tiny))
    while True:
        damped = hessian.copy()
        damped[np.diag_indices(len(damped))] += damping * mean
        try:
            return upper_factor(damped)
        except np.linalg.LinAlgError:
            damping = max(2 * damping, 1e-6)


def row_scales(rotated: Floats, fmt: str, threads: int) -> Floats:
    """The row scales [rows, padded] that round-to-nearest takes: the largest scale of a row over 127."""
    packed = _native.pack_matrix([rotate(rotated)], fmt, threads=threads)
    blocks = packed.reshape(-(-len(rotated) // BLOCK_ROWS), -1)
    return np.ascontiguousarray(blocks[:, : BLOCK_ROWS * 4]).view(np.float32).reshape(-1)


def pack(quantized: Quantized, fmt: str) -> Bytes:
    """The bytes of csrc/layout.h: blocks of 16 rows, their scales and codes before their values."""
    rows, cols = quantized.values.shape
    blocks, groups = rows // BLOCK_ROWS, quantized.codes.shape[1]
    codes = quantized.codes.reshape(blocks, BLOCK_ROWS, groups).transpose(0, 2, 1).reshape(blocks, -1)
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 64))).view(np.uint8)
    scales = quantized.row_scale.reshape(blocks, BLOCK_ROWS).view(np.uint8)
    # [blocks][steps][16 rows][4 columns]
    steps: Bytes = quantized.values.reshape(blocks, BLOCK_ROWS, cols // 4, 4).transpose(0, 2, 1, 3)
    return np.concatenate([scales, codes, _values(steps, fmt)], axis=1).reshape(-1)


def _values(steps: Bytes, fmt: str) -> Bytes:
    """The values of each block, [blocks][bytes]."""
    blocks = len(steps)
    if fmt == "int8":
        return steps.reshape(blocks, -1)
    if fmt == "int4":
        halves: Bytes = steps[:, 0::2] | steps[:, 1::2] << np.uint8(4)
        return halves.reshape(blocks, -1)
    groups = steps.reshape(blocks, -1, GROUP // 4, BLOCK_ROWS, 4)
    low, high = groups & 15, groups >> 4
    nibbles = low[:, :, 0::2] | low[:, :, 1::2] << 4
    pairs = high[:, :, 0::4] | high[:, :, 1::4] << 2 | high[:, :, 2::4] << 4 | high[:, :, 3::4] << 6
    return np.concatenate([nibbles, pairs], axis=2).reshape(blocks, -1)

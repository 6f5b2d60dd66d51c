"""Numbers in another floating-point type: to nearest, ties to even, and never to infinity in silence."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llm_boost.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LARGEST = {np.dtype(np.float16): 65504.0, BFLOAT16: 3.3895313892515355e38}


def cast(array: NDArray[Any], dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    """`array`, of float32, float16 or bfloat16, as one of them; `where` names file and tensor.

    Infinities and NaN stay what they are. bfloat16 is done on the bits: several times as fast as the
    conversions of ml_dtypes, with the same results.

    Raises:
        CheckpointError: a finite value is beyond the largest of `dtype`.
    """
    if array.dtype == dtype:
        return array
    wide = _widened(array)
    if dtype == np.float32:
        return wide
    with np.errstate(over="ignore"):
        narrow = _to_bfloat16(wide) if dtype == BFLOAT16 else wide.astype(dtype)
    overflowed = _infinite(narrow) & np.isfinite(wide)
    if overflowed.any():
        largest = np.abs(wide[overflowed]).max()
        raise CheckpointError(
            f"{where}: {np.count_nonzero(overflowed)} values, up to {largest:.6g}, are beyond {dtype.name}, "
            f"whose largest is {LARGEST[dtype]:.6g}; choose bf16 or fp32"
        )
    return narrow


def survives(array: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """Whether every value is one of `dtype`'s too."""
    try:
        there = cast(array, dtype, "")
    except CheckpointError:
        return False
    return np.array_equal(_widened(there).view(np.uint32), _widened(array).view(np.uint32))


def _widened(array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype == BFLOAT16:
        bits = np.left_shift(np.ascontiguousarray(array).view(np.uint16), 16, dtype=np.uint32)
        return bits.view(np.float32)
    return np.ascontiguousarray(array, dtype=np.float32)


def _to_bfloat16(wide: NDArray[np.float32]) -> NDArray[Any]:
    """The upper half of the bits, after adding half of the lower's range (less one if the upper is even)."""
    bits = wide.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(wide)
    if nan.any():
        rounded[nan] = bits[nan] >> 16 & 0x8000 | 0x7FC0
    return rounded.astype(np.uint16).view(BFLOAT16)


def _infinite(array: NDArray[Any]) -> NDArray[Any]:
    """numpy's own isinf is slow on 16 bits."""
    exponent = 0x7F80 if array.dtype == BFLOAT16 else 0x7C00
    infinite: NDArray[Any] = np.equal(array.view(np.uint16) & 0x7FFF, exponent)
    return infinite

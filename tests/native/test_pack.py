"""The packer against a slow, obvious NumPy reference of the same scheme, byte for byte."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from llm_boost import _native

Array = NDArray[np.float32]
QUANTIZED = ["int8", "int6", "int4"]
FORMATS = ["float32", "bfloat16", *QUANTIZED]
SHAPES = [(16, 64), (1, 1), (17, 65), (40, 192), (5, 100), (33, 320), (3, 33)]
CODEBOOK = np.array(
    [-127, -101, -79, -62, -47, -33, -21, -9, 2, 13, 25, 37, 50, 65, 83, 107], dtype=np.float32
)
MIDPOINTS = (CODEBOOK[1:] + CODEBOOK[:-1]) / 2
GROUP = {"int8": 64, "int6": 64, "int4": 32}
ONE = np.float32(1)


def weights(rows: int, cols: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32)


def pad(w: Array, row_multiple: int, col_multiple: int) -> Array:
    return np.pad(w, ((0, -w.shape[0] % row_multiple), (0, -w.shape[1] % col_multiple)))


def rotated(w: Array) -> Array:
    """w H / 64 over each 64 columns, by the butterflies of the fast transform."""
    x = (w * np.float32(1 / 64)).reshape(len(w), -1, 64)
    for half in (1, 2, 4, 8, 16, 32):
        pairs = x.reshape(*x.shape[:2], 64 // (2 * half), 2, half)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=3)
        x = x.reshape(*pairs.shape[:2], 64)
    return x.reshape(w.shape)


def ordered_sum(x: Array) -> Array:
    """Float32 sum over the last axis, first to last."""
    return np.add.accumulate(x, axis=-1, dtype=np.float32)[..., -1]


def nearest_level(t: Array, fmt: str) -> Array:
    if fmt == "int4":
        return CODEBOOK[np.searchsorted(MIDPOINTS, t)]
    return np.float32(4) * np.clip(np.rint(np.float32(0.25) * t), -32, 31)


def searched_scales(groups: Array, fmt: str) -> Array:
    guesses, end = (
        ([0.68, 0.774, 0.868, 0.962, 1.056, 1.15], 127) if fmt == "int4" else ([0.94, 1.0, 1.06], 128)
    )
    top = np.abs(groups).max(-1)
    zero = top < np.float32(1e-30)
    unit = groups * (ONE / np.where(zero, ONE, top) * ~zero)[..., None]
    best, scale = np.zeros_like(top), np.ones_like(top)

    def improve(guess: Array) -> None:
        values = nearest_level(unit * (ONE / guess)[..., None], fmt)
        wc, cc = ordered_sum(unit * values), ordered_sum(values * values)
        fitted = np.divide(wc, cc, out=np.zeros_like(wc), where=cc > 0)
        explained = wc * fitted
        better = explained > best
        scale[better], best[better] = fitted[better], explained[better]

    for share in np.float32(guesses):
        for sign in np.float32([end, -end]):
            improve(np.full_like(top, share / sign))
    improve(scale.copy())
    improve(scale.copy())
    return np.where(zero, np.float32(0), scale * top)


def int8_scales(groups: Array) -> Array:
    top = np.abs(groups).max(-1)
    return np.where(top < np.float32(1e-30), np.float32(0), top * np.float32(1 / 127))


def reference(w: Array, fmt: str) -> bytes:
    """The bytes of csrc/layout.h."""
    if fmt == "float32":
        return pad(w, 16, 1).reshape(-1, 16, w.shape[1]).transpose(0, 2, 1).tobytes()
    if fmt == "bfloat16":
        x = pad(w, 16, 2).astype(ml_dtypes.bfloat16)
        return x.reshape(-1, 16, x.shape[1] // 2, 2).transpose(0, 2, 1, 3).tobytes()
    x = rotated(pad(w, 16, 64))
    groups = x.reshape(len(x), -1, GROUP[fmt])
    scales = int8_scales(groups) if fmt == "int8" else searched_scales(groups, fmt)
    row_scale = np.abs(scales).max(-1, keepdims=True) / np.float32(127)
    ratio = np.divide(np.abs(scales), row_scale, out=np.zeros_like(scales), where=row_scale > 0)
    codes = np.where(scales == 0, np.float32(0), np.copysign(np.clip(np.rint(ratio), 1, 127), scales))
    product = row_scale * codes
    inverse = np.divide(ONE, product, out=np.zeros_like(scales), where=codes != 0)
    t = (groups * inverse[..., None]).reshape(x.shape)
    blocks = []
    for b in range(0, len(x), 16):
        code_bytes = codes[b : b + 16].T.astype(np.int8).tobytes()
        blocks.append(row_scale[b : b + 16].tobytes() + code_bytes + bytes(-len(code_bytes) % 64))
        if fmt == "int8":
            q = (np.clip(np.rint(t[b : b + 16]), -127, 127) + 128).astype(np.uint8)
            blocks.append(q.reshape(16, -1, 4).transpose(1, 0, 2).tobytes())
        elif fmt == "int4":
            index = np.searchsorted(MIDPOINTS, t[b : b + 16]).astype(np.uint8)
            pairs = index.reshape(16, -1, 2, 4).transpose(1, 2, 0, 3)  # [pair][step of the pair][row][4]
            blocks.append((pairs[:, 0] | pairs[:, 1] << 4).tobytes())
        else:
            q = (nearest_level(t[b : b + 16], fmt) / 4 + 32).astype(np.uint8)
            steps = q.reshape(16, -1, 16, 4).transpose(1, 2, 0, 3)  # [group][step][row][4]
            low = (steps[:, 0::2] & 15) | (steps[:, 1::2] & 15) << 4
            high = sum((steps[:, j::4] >> 4) << (2 * j) for j in range(4))
            blocks.append(np.concatenate([low, high], axis=1).tobytes())
    return b"".join(blocks)


def pack(w: Array, fmt: str, threads: int = 1) -> NDArray[np.uint8]:
    return _native.pack_matrix([w], fmt, threads=threads)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_equal_the_reference(fmt: str, shape: tuple[int, int]) -> None:
    w = weights(*shape)
    packed = pack(w, fmt)
    assert packed.size == _native.packed_bytes(fmt, *shape)
    assert packed.tobytes() == reference(w, fmt)


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_bytes_equal_the_reference_on_awkward_values(fmt: str) -> None:
    w = weights(48, 256, seed=1)
    w[3] = 0  # a row of zeros
    w[4, 64:128] = 0  # a group of zeros
    w[5, 7] = 1000  # an outlier
    w[6] *= np.float32(1e30)
    w[7] *= np.float32(1e-25)
    w[8] = 1e-41  # denormal: counts as zero
    w[9, :128] *= np.float32(1e-4)  # groups far below the row's largest
    w[10] = 0.5  # constant: one value after the rotation
    assert pack(w, fmt).tobytes() == reference(w, fmt)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("source", ["float16", "bfloat16"])
def test_sources_convert_exactly(fmt: str, source: str) -> None:
    w = weights(20, 130)
    w[0, :6] = [0.0, -0.0, 65504.0, 6e-8, -3e-6, 1.0]  # float16's largest and denormals
    stored = w.astype(np.float16 if source == "float16" else ml_dtypes.bfloat16)
    raw = stored if source == "float16" else stored.view(np.uint16)
    assert _native.pack_matrix([raw], fmt).tobytes() == reference(stored.astype(np.float32), fmt)


def test_bfloat16_rounds_to_nearest_even() -> None:
    w = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0xBF818000]], dtype=np.uint32).view(np.float32)
    out = _native.unpack_rows(pack(w, "bfloat16"), "bfloat16", 1, 4)
    np.testing.assert_array_equal(out.view(np.uint32) >> 16, [[0x3F80, 0x3F82, 0x3F81, 0xBF82]])


@pytest.mark.parametrize("fmt", FORMATS)
def test_thread_count_does_not_show(fmt: str) -> None:
    w = weights(200, 150)
    one = pack(w, fmt)
    for threads in (2, 3, 32):
        assert np.array_equal(pack(w, fmt, threads), one)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(fmt: str, shape: tuple[int, int]) -> None:
    w = weights(*shape)
    out = _native.unpack_rows(pack(w, fmt), fmt, *shape)
    assert out.shape == w.shape
    assert out.dtype == np.float32
    if fmt == "float32":
        np.testing.assert_array_equal(out, w)
    else:
        largest_error = {"bfloat16": 2**-8, "int8": 0.025, "int6": 0.05, "int4": 0.25}[fmt]
        assert np.linalg.norm(out - w) <= largest_error * np.linalg.norm(w)


@pytest.mark.parametrize(("fmt", "relative_mse"), [("int8", 4.8e-5), ("int6", 6.5e-4), ("int4", 5.45e-3)])
def test_error_on_gaussian_weights(fmt: str, relative_mse: float) -> None:
    """The errors that the formats were chosen for (benchmarks/DIARY.md)."""
    w = weights(512, 512)
    error = _native.unpack_rows(pack(w, fmt, 2), fmt, *w.shape) - w
    assert np.square(error).sum() <= relative_mse * np.square(w).sum()


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_an_outlier_costs_only_its_neighbours(fmt: str) -> None:
    w = weights(16, 256)
    clean = _native.unpack_rows(pack(w, fmt), fmt, 16, 256)
    w[2, 70] = 30
    out = _native.unpack_rows(pack(w, fmt), fmt, 16, 256)
    np.testing.assert_array_equal(np.delete(out, 2, axis=0), np.delete(clean, 2, axis=0))
    assert out[2, 70] == pytest.approx(30, rel=0.06)


@pytest.mark.parametrize("fmt", FORMATS)
def test_stacked_parts_equal_one_matrix(fmt: str) -> None:
    q, k, v = weights(40, 96), weights(9, 96, 1), weights(7, 96, 2)
    parts = [q, k.astype(np.float16), v]
    whole = np.concatenate([q, k.astype(np.float16).astype(np.float32), v])
    assert np.array_equal(_native.pack_matrix(parts, fmt), pack(whole, fmt))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", [32, 20])
def test_interleaved_parts_alternate_by_block(fmt: str, rows: int) -> None:
    gate, up = weights(rows, 64), weights(rows, 64, 1)
    packed = _native.pack_matrix([gate, up], fmt, interleave=True).reshape(4, -1)
    assert np.array_equal(packed[0::2].ravel(), pack(gate, fmt))
    assert np.array_equal(packed[1::2].ravel(), pack(up, fmt))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nan_and_infinity_are_refused(fmt: str, value: float, dtype: type) -> None:
    w = weights(40, 70).astype(dtype)
    w[0, 0] = w[39, 69] = value
    with pytest.raises(ValueError, match="2 weights are NaN or infinite"):
        _native.pack_matrix([w], fmt, threads=2)


def test_float_beyond_bfloat16_is_refused() -> None:
    w = weights(2, 2)
    w[1, 0] = np.finfo(np.float32).max
    with pytest.raises(ValueError, match="1 weights are NaN or infinite"):
        pack(w, "bfloat16")


def test_wrong_arguments_are_refused() -> None:
    w = weights(16, 64)
    with pytest.raises(ValueError, match="int3"):
        pack(w, "int3")
    with pytest.raises(ValueError, match="no matrix"):
        _native.pack_matrix([], "int8")
    with pytest.raises(ValueError, match="equal columns: 64 and 32"):
        _native.pack_matrix([w, weights(16, 32)], "int8")
    with pytest.raises(ValueError, match="equal rows: 16 and 32"):
        _native.pack_matrix([w, weights(32, 64)], "int8", interleave=True)
    with pytest.raises(ValueError, match="float32, float16"):
        _native.pack_matrix([w.astype(np.int32)], "int8")
    for rows, cols in ((17, 64), (16, 65), (2**62, 2**62), (2**63, 2)):
        with pytest.raises(ValueError, match="do not hold"):
            _native.unpack_rows(pack(w, "int8"), "int8", rows, cols)

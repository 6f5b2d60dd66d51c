"""The matrix products of every instruction set against numpy: formats, shapes, batches, threads."""

from __future__ import annotations

import numpy as np
import packed_reference as ref
import pytest

from llm_boost import _native

FORMATS = ("float32", "bfloat16", "int8", "int6", "int4")
ISAS = _native.available_isas()
SHAPES = [(64, 64), (16, 32), (100, 80), (200, 576), (96, 4160)]


class Product:
    """logits = norm(x) @ w.T through a plan whose embedding table holds the rows of x."""

    def __init__(self, x, packed, fmt, rows, isa, threads=1, norm=None, eps=1e-6):
        tokens, cols = x.shape
        self.tokens = tokens
        self.plan = _native.Plan(threads, isa, max(tokens, 1), 1, 1, 16, "float32", 1, 64, 16)
        h = self.plan.buffer(cols)
        self.plan.embed(np.ascontiguousarray(x).view(np.uint8).ravel(), "float32", tokens, cols, h)
        self.plan.logits(h, norm, eps, packed, fmt, rows, cols)

    def __call__(self, which=None):
        ids = np.arange(self.tokens, dtype=np.int32) if which is None else np.asarray(which, np.int32)
        n = len(ids)
        rope = np.zeros((n, 8), np.float32)
        blocks = np.arange(-(-n // 16), dtype=np.int32)[None]
        out = self.plan.run(
            ids,
            np.array([0, n], np.int32),
            np.array([n], np.int32),
            blocks,
            np.arange(n, dtype=np.int32),
            rope,
            rope,
        )
        return out.copy()


def inputs(rng, tokens, cols):
    return (rng.standard_normal((tokens, cols)) * rng.uniform(0.1, 5, (tokens, 1))).astype(np.float32)


def tolerance(fmt):  # float32 sums in another order than numpy's
    return 1e-5 if fmt == "float32" else 2e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 29])
def test_product_equals_numpy(isa, fmt, rows, cols, tokens):
    rng = np.random.default_rng(rows * 1000 + cols + tokens)
    x, packed = inputs(rng, tokens, cols), ref.random_packed(fmt, rows, cols, rng)
    got = Product(x, packed, fmt, rows, isa)()
    a, w = ref.round_activations(x, fmt), ref.unpack(packed, fmt, rows, cols)
    bound = tolerance(fmt) * (np.abs(a) @ np.abs(w).T)
    assert np.all(np.abs(got - a @ w.T) <= bound + 1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_row_does_not_depend_on_its_batch_or_on_threads(isa, fmt):
    rng = np.random.default_rng(1)
    x, packed = inputs(rng, 20, 96), ref.random_packed(fmt, 80, 96, rng)
    whole = Product(x, packed, fmt, 80, isa, threads=3)()
    product = Product(x, packed, fmt, 80, isa, threads=1)
    for which in ([3], [0, 19], list(range(7)), list(range(19, 4, -1))):
        np.testing.assert_array_equal(product(which), whole[which])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["float32", "int8"])
def test_norm_comes_before_the_product(isa, fmt):
    rng = np.random.default_rng(2)
    x, packed = inputs(rng, 8, 80), ref.random_packed(fmt, 48, 80, rng)
    norm = rng.uniform(0.5, 1.5, 80).astype(np.float32)
    got = Product(x, packed, fmt, 48, isa, norm=norm, eps=1e-5)()
    a = ref.round_activations(ref.rms_norm(x, norm, 1e-5), fmt)
    want = a @ ref.unpack(packed, fmt, 48, 80).T
    # a value on the border between two int8 levels may fall on either side
    slack = 1e-4 if fmt == "float32" else 2e-2
    np.testing.assert_allclose(got, want, rtol=0, atol=slack * np.abs(want).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_zero_and_huge_activations_stay_finite(isa, fmt):
    rng = np.random.default_rng(3)
    x = np.zeros((3, 64), np.float32)
    x[1] = 1e30 * rng.standard_normal(64)
    x[2, 5] = 1e-38
    packed = ref.random_packed(fmt, 32, 64, rng)
    got = Product(x, packed, fmt, 32, isa)()
    assert np.all(got[0] == 0)
    assert np.all(np.isfinite(got))

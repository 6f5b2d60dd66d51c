"""The attention of every instruction set against numpy: shapes, the paged cache, batches, threads."""

from __future__ import annotations

from functools import cache

import numpy as np
import packed_reference as ref
import pytest

from llm_boost import _native

ISAS = _native.available_isas()
CACHES = ("float32", "int16", "int8")
# Relative to the sum of probabilities times magnitudes, after the cache's own rounding.
TOLERANCE = {"float32": 2e-5, "int16": 2.0**-9, "int8": 2.0**-8}
EPS = 1e-6

# head_dim, group, kv_heads, block_size
SHAPES = [
    (16, 1, 3, 16),
    (32, 3, 2, 32),
    (64, 7, 2, 128),
    (80, 8, 1, 16),
    (128, 3, 1, 32),
    (256, 1, 1, 128),
    (32, 12, 1, 16),
    (16, 9, 1, 128),
]
# around the borders of 16 positions, of blocks, of a tile of 128
LENGTHS = (1, 15, 16, 17, 32, 33, 63, 65, 126, 127, 128, 129, 255, 257)


@cache
def identity(width):
    return _native.pack_matrix([np.eye(width, dtype=np.float32)], "float32")


class Sequence:
    def __init__(self, tokens, blocks):
        self.tokens, self.blocks, self.done = np.asarray(tokens, np.int32), list(blocks), 0


class Attention:
    """A layer of attention. A token's q, k and v are its row of `qkv`, [rows][heads + 2 * kv_heads][dim]."""

    def __init__(self, qkv, group, isa, *, fmt="float32", block_size=16, blocks=64, threads=1, **options):
        rows, all_heads, self.dim = qkv.shape
        kv_heads = all_heads // (group + 2)
        self.heads, self.block_size, self.blocks = kv_heads * group, block_size, blocks
        self.scale = options.get("scale", self.dim**-0.5)
        self.plan = _native.Plan(
            threads, isa, 2048, self.heads, kv_heads, self.dim, fmt, 2, blocks, block_size
        )
        packed, out = self.plan.buffer(all_heads * self.dim), self.plan.buffer(self.heads * self.dim)
        table = np.ascontiguousarray(qkv, np.float32).view(np.uint8).ravel()
        self.plan.embed(table, "float32", rows, all_heads * self.dim, packed)
        norms = options.get("q_norm"), options.get("k_norm")
        centre = options.get("k_centre")
        self.plan.attention(packed, 1, *norms, EPS, self.dim, self.scale, out, centre)  # of the second layer
        width = self.heads * self.dim
        self.plan.logits(out, None, 0.0, identity(width), "float32", width, width)

    def sequence(self, tokens, blocks=None):
        needed = -(-len(tokens) // self.block_size)
        return Sequence(tokens, range(needed) if blocks is None else blocks)

    def step(self, *chunks):
        """Runs the next n tokens of each (sequence, n); returns [n][heads][dim] of each."""
        ids, positions, starts = [], [], [0]
        tables = np.full((len(chunks), max(len(s.blocks) for s, _ in chunks)), -1, np.int32)
        for table, (s, n) in zip(tables, chunks, strict=True):
            table[: len(s.blocks)] = s.blocks
            ids.append(s.tokens[s.done : s.done + n])
            positions.append(np.arange(s.done, s.done + n))
            starts.append(starts[-1] + n)
            s.done += n
        contexts = np.array([s.done for s, _ in chunks], np.int32)
        cos, sin = rope_of(np.concatenate(positions), self.dim)
        every = np.arange(starts[-1], dtype=np.int32)
        starts = np.array(starts, np.int32)
        out = self.plan.run(np.concatenate(ids), starts, contexts, tables, every, cos, sin).copy()
        return np.split(out.reshape(-1, self.heads, self.dim), starts[1:-1])

    def whole(self, tokens, blocks=None):
        sequence = self.sequence(tokens, blocks)
        return self.step((sequence, len(sequence.tokens)))[0]


def rope_of(positions, dim):
    angles = positions[:, None] / 1000.0 ** (np.arange(dim // 2) / (dim // 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x, cos, sin):
    """x [tokens][heads][dim], rotated in halves (Hugging Face's order of a head's dimensions)."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def cached(x, fmt, largest_int16):
    """x [...][dim] as the cache gives it back: integers relative to a head's largest; int8 rotated before."""
    if fmt == "float32":
        return x
    if fmt == "int16":
        unit = np.abs(x).max(-1, keepdims=True) / largest_int16
        return np.round(x / np.maximum(unit, 1e-30)) * unit
    pieces = x.reshape(*x.shape[:-1], -1, 64 if x.shape[-1] % 64 == 0 else 16)
    h = ref.hadamard(pieces.shape[-1])
    rotated = (pieces @ h).reshape(x.shape)
    unit = np.abs(rotated).max(-1, keepdims=True) / 127
    rounded = np.round(rotated / np.maximum(unit, 1e-30)) * unit
    return (rounded.reshape(pieces.shape) @ h / len(h)).reshape(x.shape)


def expected(qkv, group, fmt="float32", scale=None, q_norm=None, k_norm=None):
    """(outputs, bound of their error / machine epsilon), [tokens][heads][dim], of one sequence of rows."""
    tokens, all_heads, dim = qkv.shape
    kv_heads = all_heads // (group + 2)
    heads = kv_heads * group
    q, k, v = np.split(qkv.astype(np.float64), [heads, heads + kv_heads], axis=1)
    if q_norm is not None:
        q, k = ref.rms_norm(q, q_norm, EPS), ref.rms_norm(k, k_norm, EPS)
    cos, sin = rope_of(np.arange(tokens), dim)
    q, k = rotate(q, cos, sin) * (dim**-0.5 if scale is None else scale), rotate(k, cos, sin)
    k, v = cached(k, fmt, 16383), cached(v, fmt, 32767)
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,shd->hts", q, k)
    scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", p, v), np.einsum("hts,shd->thd", p, np.abs(v))


def assert_close(got, qkv, group, fmt, **options):
    want, size = expected(qkv, group, fmt, **options)
    if fmt != "float32":
        size = size.max(-1, keepdims=True)
    assert np.max(np.abs(got - want) - TOLERANCE[fmt] * size) <= 1e-6, np.max(
        np.abs(got - want) / (size + 1e-9)
    )


def random_qkv(rng, rows, dim, group, kv_heads):
    return rng.standard_normal((rows, (group + 2) * kv_heads, dim)).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", CACHES)
@pytest.mark.parametrize(("dim", "group", "kv_heads", "block_size"), SHAPES)
def test_prefill_and_decode_equal_numpy(isa, fmt, dim, group, kv_heads, block_size):
    rng = np.random.default_rng(dim + group)
    qkv = random_qkv(rng, 300, dim, group, kv_heads)
    attention = Attention(qkv, group, isa, fmt=fmt, block_size=block_size, blocks=110)
    free = iter(rng.permutation(110))
    sequences = []
    for n in LENGTHS:
        tokens = rng.integers(0, 300, n + 2)
        sequences.append(attention.sequence(tokens, [next(free) for _ in range(-(-(n + 2) // block_size))]))
    steps = [attention.step(*((s, len(s.tokens) - 2) for s in sequences))]
    steps += [attention.step(*((s, 1) for s in sequences)) for _ in range(2)]
    for s, *outs in zip(sequences, *steps, strict=True):
        assert_close(np.concatenate(outs), qkv[s.tokens], group, fmt)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", CACHES)
@pytest.mark.parametrize("group", [1, 3, 7, 8, 12])
def test_chunks_and_decodes_equal_the_whole_to_the_bit(isa, fmt, group):
    rng = np.random.default_rng(group)
    qkv = random_qkv(rng, 150, 32, group, 2)
    attention = Attention(qkv, group, isa, fmt=fmt, block_size=32)
    tokens = np.arange(150)
    want = attention.whole(tokens, range(5))
    for chunks in ([150 - 6] + [1] * 6, [1] * 3 + [147], [16, 48, 1, 64, 21], [65, 2, 3, 80], [7] * 21 + [3]):
        sequence = attention.sequence(tokens, range(10, 15))
        outs = [attention.step((sequence, n))[0] for n in chunks]
        np.testing.assert_array_equal(np.concatenate(outs), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", CACHES)
@pytest.mark.parametrize("group", [3, 12])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sequence_does_not_depend_on_its_batch_or_on_threads(isa, fmt, group, threads):
    rng = np.random.default_rng(group)
    qkv = random_qkv(rng, 200, 16, group, 2)
    alone = Attention(qkv, group, isa, fmt=fmt)
    batched = Attention(qkv, group, isa, fmt=fmt, threads=threads)
    lengths = [70, 40, 17, 33, 90, 5]
    rows = [rng.integers(0, 200, n) for n in lengths]
    want = [alone.whole(tokens) for tokens in rows]
    free = iter(rng.permutation(64))
    sequences = [batched.sequence(t, [next(free) for _ in range(-(-len(t) // 16))]) for t in rows]
    got = [[] for _ in rows]
    while running := [i for i, s in enumerate(sequences) if s.done < lengths[i]]:
        # prefill chunks of any size beside decodes: every other sequence advances by one token
        sizes = [
            1 if i % 2 and sequences[i].done else int(rng.integers(1, lengths[i] - sequences[i].done + 1))
            for i in running
        ]
        for i, out in zip(
            running,
            batched.step(*((sequences[i], n) for i, n in zip(running, sizes, strict=True))),
            strict=True,
        ):
            got[i].append(out)
    for outs, whole in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.concatenate(outs), whole)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", CACHES)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
def test_a_former_owner_leaves_nothing_in_a_block(isa, fmt, garbage):
    rng = np.random.default_rng(5)
    qkv = random_qkv(rng, 101, 32, 3, 1)
    qkv[100] = garbage
    fresh = Attention(qkv, 3, isa, fmt=fmt, block_size=32)
    used = Attention(qkv, 3, isa, fmt=fmt, block_size=32)
    for n in (1, 2, 16, 17, 31, 33, 65, 99):
        used.whole(np.full(128, 100), [3, 0, 2, 1])  # every position of the four blocks
        want, sequence = fresh.whole(np.arange(n + 1)), used.sequence(np.arange(n + 1), [2, 1, 3, 0])
        got = np.concatenate([used.step((sequence, n))[0], used.step((sequence, 1))[0]])
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", CACHES)
def test_a_neighbour_that_is_not_a_number_stays_alone(isa, fmt):
    rng = np.random.default_rng(6)
    qkv = random_qkv(rng, 41, 16, 3, 2)
    qkv[40] = np.nan
    attention = Attention(qkv, 3, isa, fmt=fmt)
    want = attention.whole(np.arange(40))
    good, bad = attention.sequence(np.arange(40), [4, 6, 8]), attention.sequence(np.full(40, 40), [5, 7, 9])
    np.testing.assert_array_equal(attention.step((bad, 40), (good, 40))[1], want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", CACHES)
def test_a_token_sees_nothing_after_it(isa, fmt):
    qkv = random_qkv(np.random.default_rng(7), 160, 16, 7, 1)
    qkv[140:, -1] = 3e38  # the values of twenty tokens: times the least of probabilities they would show
    attention = Attention(qkv, 7, isa, fmt=fmt)
    whole = attention.whole(np.arange(140))
    for n in (1, 2, 15, 16, 17, 64, 65, 129):
        others = np.concatenate([np.arange(n), np.arange(159, 139, -1)])
        np.testing.assert_array_equal(attention.whole(others)[:n], whole[:n])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", CACHES)
def test_norms_of_q_and_k_and_the_scale(isa, fmt):
    rng = np.random.default_rng(8)
    qkv = random_qkv(rng, 70, 80, 3, 2) * rng.uniform(0.1, 10, (70, 10, 1)).astype(np.float32)
    options = {
        "q_norm": rng.uniform(0.5, 1.5, 80).astype(np.float32),
        "k_norm": rng.uniform(0.5, 1.5, 80).astype(np.float32),
        "scale": 0.3,
    }
    got = Attention(qkv, 3, isa, fmt=fmt, **options).whole(np.arange(70))
    assert_close(got, qkv, 3, fmt, **options)


@pytest.mark.parametrize("isa", ISAS)
def test_a_centre_taken_from_keys_does_not_show_but_for_smaller_errors(isa):
    rng = np.random.default_rng(12)
    qkv = random_qkv(rng, 200, 64, 3, 2)
    centre = (rng.standard_normal((2, 64)) * 100 * (np.arange(64) % 32 > 24)).astype(np.float32)
    qkv[:, 6:8] += centre  # slow pairs: the bias stays where it is while positions turn
    want, size = expected(qkv, 3)
    errors = [
        np.abs(Attention(qkv, 3, isa, fmt="int8", k_centre=c).whole(np.arange(200)) - want)
        for c in (None, centre.ravel())
    ]
    assert np.mean(errors[1] / size) < 0.2 * np.mean(errors[0] / size)
    exact = Attention(qkv, 3, isa, k_centre=centre.ravel()).whole(np.arange(200))
    np.testing.assert_array_equal(exact, Attention(qkv, 3, isa).whole(np.arange(200)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", CACHES)
@pytest.mark.parametrize("size", [30.0, 1e4, 1e8])
def test_huge_scores_pick_one_value(isa, fmt, size):
    """exp overflows at 88 and underflows at -87; the softmax must not, whichever tile holds the peak."""
    rng = np.random.default_rng(9)
    qkv = random_qkv(rng, 130, 16, 1, 1)
    qkv[:, 0] *= np.float32(size)
    attention = Attention(qkv, 1, isa, fmt=fmt)
    got = attention.whole(np.arange(130))
    want, _ = expected(qkv, 1, fmt)
    scores_of_peaks = np.sort(_scores(qkv, fmt), axis=-1)
    gap = scores_of_peaks[:, -1] - scores_of_peaks[:, -2]
    clear = gap > 30 + 1e-5 * np.abs(scores_of_peaks[:, -1])  # no second best within float32's rounding
    assert clear.sum() > 60 or size < 1e3
    assert np.isfinite(got).all()
    tolerance = 1e-5 if fmt == "float32" else 2.0**-7
    np.testing.assert_allclose(got[clear], want[clear], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", CACHES)
def test_scores_that_are_all_far_below_zero(isa, fmt):
    rng = np.random.default_rng(10)
    qkv = np.zeros((130, 3, 16), np.float32)
    qkv[:, 0, [7, 15]] = -100  # the slowest pair of the rotation: keys stay opposite to every query
    qkv[:, 1, [7, 15]] = rng.uniform(9.9, 10.1, (130, 2)).astype(np.float16)
    qkv[:, 2] = rng.standard_normal((130, 16))
    assert _scores(qkv, fmt)[np.tri(130, dtype=bool)].max() < -300
    got = Attention(qkv, 1, isa, fmt=fmt).whole(np.arange(130))
    want, size = expected(qkv, 1, fmt)
    # scores of 500 are worth 5e-4 of a probability in float32, and half a unit of their keys in float16
    tolerance = 2e-3 if fmt == "float32" else 0.6
    assert np.all(np.abs(got - want) <= tolerance * size)


def _scores(qkv, fmt):
    cos, sin = rope_of(np.arange(len(qkv)), qkv.shape[-1])
    q, k = rotate(qkv[:, :1].astype(np.float64), cos, sin), rotate(qkv[:, 1:2].astype(np.float64), cos, sin)
    if fmt == "bfloat16":
        k = k.astype(np.float16).astype(np.float64)
    scores = np.einsum("thd,shd->ts", q, k) * qkv.shape[-1] ** -0.5
    return np.where(np.tri(len(qkv), dtype=bool), scores, -np.inf)

"""The plan executor: what a step may hold, epilogues and parts of a linear, the thread pool."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import packed_reference as ref
import pytest

from llm_boost import _native

ISAS = _native.available_isas()
FORMATS = ("float32", "bfloat16", "int8", "int6", "int4")
TOKENS, BLOCKS, BLOCK_SIZE, VOCAB, DIM = 40, 6, 16, 50, 16


def as_table(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint8).ravel()


def new_plan(isa=ISAS[0], threads=1, tokens=TOKENS):
    return _native.Plan(threads, isa, tokens, 1, 1, DIM, "float32", 1, BLOCKS, BLOCK_SIZE)


def good_step():
    """Two sequences of 17 and 3 tokens, the second with 9 tokens in the cache."""
    rope = np.zeros((20, DIM // 2), np.float32)
    return {
        "token_ids": np.arange(20, dtype=np.int32),
        "seq_starts": np.array([0, 17, 20], np.int32),
        "context_lens": np.array([17, 12], np.int32),
        "block_tables": np.array([[4, 0], [2, -1]], np.int32),
        "logit_rows": np.array([16, 19], np.int32),
        "cos": rope + 1,
        "sin": rope,
    }


def ints(*values):
    return np.array(values, np.int32)


BAD_STEPS = {
    "a negative token": {"token_ids": ints(*range(19), -1)},
    "a token beyond the table": {"token_ids": ints(*range(19), VOCAB)},
    "no token": {
        "token_ids": ints(),
        "seq_starts": ints(0, 0, 0),
        "logit_rows": ints(),
        "cos": np.zeros((0, DIM // 2), np.float32),
        "sin": np.zeros((0, DIM // 2), np.float32),
    },
    "too many tokens": {
        "token_ids": np.zeros(TOKENS + 1, np.int32),
        "seq_starts": ints(0, 17, TOKENS + 1),
        "context_lens": ints(17, 30),
        "block_tables": ints([4, 0], [2, 1]),
        "cos": np.zeros((TOKENS + 1, DIM // 2), np.float32),
        "sin": np.zeros((TOKENS + 1, DIM // 2), np.float32),
    },
    "no sequence": {
        "seq_starts": ints(20),
        "context_lens": ints(),
        "block_tables": np.zeros((0, 2), np.int32),
    },
    "starts that begin late": {"seq_starts": ints(1, 17, 20)},
    "starts that end early": {"seq_starts": ints(0, 17, 19)},
    "starts that end late": {"seq_starts": ints(0, 17, 21)},
    "starts that decrease": {"seq_starts": ints(0, 21, 20)},
    "a negative start": {"seq_starts": ints(0, -5, 20)},
    "an empty sequence": {"seq_starts": ints(0, 20, 20)},
    "too few starts": {"seq_starts": ints(0, 20)},
    "a context shorter than its tokens": {"context_lens": ints(16, 12)},
    "a negative context": {"context_lens": ints(17, -1)},
    "a context beyond the table": {"context_lens": ints(33, 12)},
    "the longest context": {"context_lens": ints(17, 2**31 - 1)},
    "a negative block": {"block_tables": ints([4, -1], [2, -1])},
    "a block beyond the cache": {"block_tables": ints([4, BLOCKS], [2, -1])},
    "a table too short": {"block_tables": ints([4], [2])},
    "a table of no block": {"block_tables": np.zeros((2, 0), np.int32)},
    "too few tables": {"block_tables": ints([4, 0])},
    "a negative logit row": {"logit_rows": ints(16, -1)},
    "a logit row beyond the tokens": {"logit_rows": ints(16, 20)},
    "more logit rows than tokens": {"logit_rows": np.zeros(21, np.int32)},
    "too few angles": {"cos": np.zeros((19, DIM // 2), np.float32)},
    "angles of another width": {
        "cos": np.zeros((20, DIM), np.float32),
        "sin": np.zeros((20, DIM), np.float32),
    },
}


@pytest.fixture(scope="module")
def attending_plan():
    rng = np.random.default_rng(0)
    plan = new_plan(threads=2)
    qkv, out = plan.buffer(3 * DIM), plan.buffer(DIM)
    plan.embed(as_table(rng.standard_normal((VOCAB, 3 * DIM))), "float32", VOCAB, 3 * DIM, qkv)
    plan.attention(qkv, 0, None, None, 0.0, DIM, 0.25, out)
    plan.logits(
        out, None, 0.0, _native.pack_matrix([np.eye(DIM, dtype=np.float32)], "float32"), "float32", DIM, DIM
    )
    first = good_step() | {  # the nine tokens that the second sequence's cache holds
        "token_ids": np.arange(9, dtype=np.int32),
        "seq_starts": ints(0, 9),
        "context_lens": ints(9),
        "block_tables": ints([2]),
        "logit_rows": ints(),
        "cos": np.ones((9, DIM // 2), np.float32),
        "sin": np.zeros((9, DIM // 2), np.float32),
    }
    assert plan.run(**first).shape == (0, DIM)
    return plan


@pytest.mark.parametrize("fault", BAD_STEPS)
def test_a_step_out_of_range_is_refused_and_changes_nothing(attending_plan, fault):
    want = attending_plan.run(**good_step()).copy()
    with pytest.raises(ValueError):
        attending_plan.run(**(good_step() | BAD_STEPS[fault]))
    np.testing.assert_array_equal(attending_plan.run(**good_step()), want)


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 0},
        {"isa": "mmx"},
        {"max_tokens": 0},
        {"kv_heads": 0},
        {"heads": 3, "kv_heads": 2},
        {"head_dim": 24},
        {"head_dim": 272},
        {"block_size": 24},
        {"block_size": 0},
        {"cache_format": "int8x"},
    ],
)
def test_a_plan_that_no_kernel_can_run_is_refused(change):
    good = {
        "threads": 1,
        "isa": ISAS[0],
        "max_tokens": 1,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
        "cache_format": "float32",
        "layers": 1,
        "num_blocks": 1,
        "block_size": 16,
    }
    _native.Plan(**good)
    with pytest.raises(ValueError):
        _native.Plan(**(good | change))


PACKED = ref.random_packed("int8", 32, 64, np.random.default_rng(0))
HALF = (PACKED[: len(PACKED) // 2], "int8", 16, 64, None)
OTHER = (ref.random_packed("float32", 16, 64, np.random.default_rng(0)), "float32", 16, 64, None)
NORM = np.ones(DIM, np.float32)


def int8_part(rows=32, cols=64, packed=PACKED, bias=None):
    return (packed, "int8", rows, cols, bias)


# Buffers: 0 is 64 wide, 1 is 32 wide, 2 holds q, k and v, 3 what attention makes of them.
BAD_OPERATIONS = {
    "a table shorter than it says": ("embed", (as_table(np.zeros((3, 64))), "float32", 4, 64, 0)),
    "a table wider than its buffer": ("embed", (as_table(np.zeros((3, 64))), "float32", 3, 64, 1)),
    "a quantised table": ("embed", (PACKED, "int8", 32, 64, 0)),
    "no such output": ("embed", (as_table(np.zeros((3, 64))), "float32", 3, 64, 4)),
    "a negative buffer": ("linear", (-1, None, 0.0, [int8_part()], "store", 1)),
    "the logits under another name": ("linear", (0, None, 0.0, [int8_part()], "store", -1)),
    "no such input": ("linear", (4, None, 0.0, [int8_part()], "store", 1)),
    "no weight": ("linear", (0, None, 0.0, [], "store", 1)),
    "a weight cut off": ("linear", (0, None, 0.0, [int8_part(packed=PACKED[:-1])], "store", 1)),
    "a weight of another format": ("linear", (0, None, 0.0, [(PACKED, "int4", 32, 64, None)], "store", 1)),
    "a weight with fewer rows": ("linear", (0, None, 0.0, [int8_part(rows=48)], "store", 1)),
    "a weight of other columns": ("linear", (1, None, 0.0, [int8_part()], "store", 1)),
    "a weight wider than its buffer": ("linear", (0, None, 0.0, [int8_part()] * 2, "store", 1)),
    "a bias too short": ("linear", (0, None, 0.0, [int8_part(bias=NORM)], "store", 1)),
    "a norm too short": ("linear", (0, NORM, 0.0, [int8_part()], "store", 1)),
    "parts of float and of int": ("linear", (0, None, 0.0, [HALF, OTHER], "store", 1)),
    "an epilogue unknown": ("linear", (0, None, 0.0, [int8_part()], "relu", 1)),
    "gate and up as wide as their product": ("linear", (0, None, 0.0, [int8_part()], "silu_mul", 1)),
    "gate and up as two parts": ("linear", (0, None, 0.0, [int8_part()] * 2, "silu_mul", 1)),
    "a layer beyond the cache": ("attention", (2, 1, None, None, 0.0, DIM, 1.0, 3)),
    "q, k and v of other heads": ("attention", (0, 0, None, None, 0.0, DIM, 1.0, 3)),
    "an output of other heads": ("attention", (2, 0, None, None, 0.0, DIM, 1.0, 1)),
    "another head_dim": ("attention", (2, 0, None, None, 0.0, 2 * DIM, 1.0, 3)),
    "a norm of another head_dim": ("attention", (2, 0, NORM[:-1], None, 0.0, DIM, 1.0, 3)),
    "a head of other columns": ("logits", (1, None, 0.0, PACKED, "int8", 32, 64)),
    "a head cut off": ("logits", (0, None, 0.0, PACKED[:-4], "int8", 32, 64)),
}


@pytest.mark.parametrize("fault", BAD_OPERATIONS)
def test_operations_that_do_not_fit_their_buffers_are_refused(fault):
    plan, (operation, arguments) = new_plan(), BAD_OPERATIONS[fault]
    for width in (64, 32, 3 * DIM, DIM):
        plan.buffer(width)
    with pytest.raises(ValueError):
        getattr(plan, operation)(*arguments)


# ---- linear


def run_linear(x, parts, epilogue, width, isa, start=None, threads=1):
    """start (op)= parts(x), read through a head of the identity."""
    tokens, cols = x.shape
    plan = new_plan(isa, threads, tokens)
    h, out = plan.buffer(cols), plan.buffer(width)
    plan.embed(as_table(np.zeros((tokens, width)) if start is None else start), "float32", tokens, width, out)
    plan.embed(as_table(x), "float32", tokens, cols, h)
    plan.linear(h, None, 0.0, parts, epilogue, out)
    head = _native.pack_matrix([np.eye(width, dtype=np.float32)], "float32")
    plan.logits(out, None, 0.0, head, "float32", width, width)
    every, rope = np.arange(tokens, dtype=np.int32), np.zeros((tokens, DIM // 2), np.float32)
    table = np.zeros((1, -(-tokens // BLOCK_SIZE)), np.int32)
    return plan.run(every, ints(0, tokens), ints(tokens), table, every, rope, rope).copy()


def part_of(fmt, rows, cols, rng, with_bias=True):
    """(a part for Plan.linear, its weight, its bias): the padding of the bias is garbage."""
    packed = ref.random_packed(fmt, rows, cols, rng)
    bias = rng.standard_normal(ref.round_up(rows, 16)).astype(np.float32)
    part = (packed, fmt, rows, cols, bias if with_bias else None)
    return part, ref.unpack(packed, fmt, rows, cols), bias[:rows] * with_bias


def assert_linear(got, a, w, bias, start=0.0):
    want = a @ w.T + bias + start
    bound = 2e-5 * (np.abs(a) @ np.abs(w).T + np.abs(bias) + np.abs(start))
    assert np.all(np.abs(got - want) <= bound + 1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tokens", [1, 6, 13])
def test_add_adds_to_what_is_there(isa, fmt, tokens):
    rng = np.random.default_rng(tokens)
    x, start = rng.standard_normal((2, tokens, 100)).astype(np.float32)
    part, w, bias = part_of(fmt, 100, 100, rng)
    got = run_linear(x, [part], "add", 100, isa, start)
    assert_linear(got, ref.round_activations(x, fmt), w, bias, start)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "formats", [("int4", "int8"), ("int8", "int4", "int6"), ("float32",) * 2, ("bfloat16",) * 3]
)
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("epilogue", ["store", "add"])
def test_parts_stand_side_by_side(isa, formats, tokens, epilogue):
    """Each with its own rows, no multiple of 16 among them, and its own bias or none."""
    rng = np.random.default_rng(len(formats))
    x = rng.standard_normal((tokens, 130)).astype(np.float32)
    sizes = (100, 7, 41)[: len(formats)]
    width = sum(sizes)
    start = rng.standard_normal((tokens, width)).astype(np.float32)
    made = [part_of(f, n, 130, rng, i != 1) for i, (f, n) in enumerate(zip(formats, sizes, strict=True))]
    got = run_linear(x, [part for part, _, _ in made], epilogue, width, isa, start, threads=3)
    column, a = 0, ref.round_activations(x, formats[0])
    for (_, w, bias), n in zip(made, sizes, strict=True):
        there = start[:, column : column + n] if epilogue == "add" else 0.0
        assert_linear(got[:, column : column + n], a, w, bias, there)
        column += n


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("inner", [16, 72, 100])
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("with_bias", [False, True])
def test_silu_mul_of_gate_and_up_in_turns(isa, fmt, inner, tokens, with_bias):
    rng = np.random.default_rng(inner)
    x = rng.standard_normal((tokens, 64)).astype(np.float32)
    blocks = ref.round_up(inner, 16) // 16
    part, w, bias = part_of(fmt, 32 * blocks, 64, rng, with_bias)
    start = rng.standard_normal((tokens, inner))  # it is overwritten
    got = run_linear(x, [part], "silu_mul", inner, isa, start, threads=2)
    y = ref.round_activations(x, fmt) @ w.T + bias
    gate, up = np.moveaxis(y.reshape(tokens, blocks, 2, 16), 2, 0).reshape(2, tokens, -1)[:, :, :inner]
    np.testing.assert_allclose(got, ref.silu(gate) * up, rtol=2e-4, atol=2e-4 * np.abs(y).max())


@pytest.mark.parametrize("isa", ISAS)
def test_silu_at_both_ends(isa):
    gate = np.array([-1e30, -1e4, -100, -88, -87, -1e-30, 0, 1e-30, 20, 87, 88, 100, 1e4, 1e30, 3, -3])
    w = np.concatenate([gate, np.ones(16)])[:, None].astype(np.float32)
    part = (_native.pack_matrix([w], "float32"), "float32", 32, 1, None)
    got = run_linear(np.ones((1, 1), np.float32), [part], "silu_mul", 16, isa)[0]
    want = ref.silu(gate)
    np.testing.assert_allclose(got[:2], 0, atol=1e-7)  # -1e30 * exp(-88): the clamp of exp leaves nothing
    np.testing.assert_allclose(got[2:], want[2:], rtol=1e-6, atol=1e-30)


# ---- threads


def run_python(code, seconds):
    """Runs `code` on its own, so that a hang ends the process and not the tests."""
    return subprocess.run(
        [sys.executable, *["-S"] * sys.flags.no_site, "-X", "faulthandler", "-c", textwrap.dedent(code)],
        timeout=seconds,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


SMALL_PLAN = """
    import time, numpy as np
    from llm_boost import _native
    def plan(threads):
        p = _native.Plan(threads, _native.available_isas()[0], 8, 1, 1, 16, "float32", 1, 4, 16)
        h = p.buffer(64)
        rng = np.random.default_rng(0)
        table = rng.standard_normal((8, 64)).astype(np.float32).view(np.uint8).ravel()
        p.embed(table, "float32", 8, 64, h)
        w = _native.pack_matrix([rng.standard_normal((200, 64)).astype(np.float32)], "float32")
        p.logits(h, None, 0.0, w, "float32", 200, 64)
        return p
    def step(p, n):
        every, rope = np.arange(n, dtype=np.int32), np.zeros((n, 8), np.float32)
        ends = np.array([0, n], np.int32)
        return p.run(every, ends, ends[1:], np.zeros((1, 1), np.int32), every, rope, rope).copy()
"""


def test_more_threads_than_cores_and_many_short_steps():
    out = run_python(
        SMALL_PLAN
        + """
    want = step(plan(1), 8)
    many = plan(16)
    for i in range(300):
        n = i % 8 + 1
        assert np.array_equal(step(many, n), want[:n]), i
        if i % 50 == 0:
            time.sleep(0.02)  # long enough for every thread to park
    print("done")
    """,
        seconds=120,
    )
    assert out == "done\n"


def test_plans_come_and_go():
    out = run_python(
        SMALL_PLAN
        + """
    want = step(plan(1), 3)
    for i in range(100):
        p = plan(i % 5 + 1)
        if i % 3:
            assert np.array_equal(step(p, 3), want)
        del p
    print("done")
    """,
        seconds=120,
    )
    assert out == "done\n"


@pytest.mark.parametrize(
    "call",
    [
        '_native.Plan(1000, "generic", 1, 1, 1, 16, "float32", 1, 1, 16)',
        '_native.pack_matrix([np.ones((64, 64), np.float32)], "int8", False, 1000)',
    ],
)
def test_threads_that_cannot_start_are_an_error(call):
    out = run_python(
        f"""
    import resource
    from pathlib import Path
    import numpy as np
    from llm_boost import _native
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (256 << 20)  # room for the stacks of some threads, not of all
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        {call}
    except Exception as error:
        print(type(error).__name__)
    """,
        seconds=60,
    )
    assert out in ("RuntimeError\n", "MemoryError\n")

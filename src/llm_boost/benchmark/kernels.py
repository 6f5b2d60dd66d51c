"""Single kernels, through the plan that the engine runs: linear, attention, conversion of activations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_boost import _native
from llm_boost.benchmark.dummy import made_matrix
from llm_boost.benchmark.limits import Limits
from llm_boost.engine.hardware import available_memory
from llm_boost.errors import ConfigError
from llm_boost.models.packing import BLOCK_ROWS

FORMATS = ("float32", "bfloat16", "int8", "int6", "int4")
CACHES = ("float32", "int16", "int8")
BLOCK_SIZE = 32
# A step passes through so many bytes that no cache has them from the step before. Beyond FEW_TOKENS
# arithmetic is the limit of a linear, and one matrix will do.
STREAMED_BYTES = 256 << 20
FEW_TOKENS = 16
SECONDS = 2.0  # of one kernel; slower ones get fewer samples

Step = Callable[[], float]  # runs once, returns seconds of one call of the kernel


@dataclass(frozen=True)
class Shape:
    """A layer: a linear of [rows, cols], and attention of `heads` queries over `kv_heads` keys and values."""

    rows: int
    cols: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Measured:
    """A kernel; `seconds` has a sample for each repetition, `dots` names what its products run on."""

    kernel: str  # linear, activate, attention
    isa: str
    format: str  # of the weights, of the activations that are made, of the cache
    size: str  # what was computed, for people
    tokens: int
    num_bytes: float  # weights, or keys and values, or activations, that one call reads
    num_operations: float  # two for a multiplication and its addition; 0 where there are no products
    seconds: list[float]

    @property
    def bytes_per_second(self) -> float:
        return self.num_bytes / statistics.median(self.seconds)

    @property
    def operations_per_second(self) -> float:
        return self.num_operations / statistics.median(self.seconds)

    def roofline(self, limits: Limits) -> float:
        """The time that the machine's limits alone would take, reading or computing, over the median."""
        computing = self.num_operations / limits.dot_rate(self.format) if self.num_operations else 0.0
        return max(self.num_bytes / limits.bandwidth, computing) / statistics.median(self.seconds)


def measure_kernels(
    isas: Sequence[str],
    shape: Shape,
    tokens: Sequence[int],
    contexts: Sequence[int],
    threads: int,
    repetitions: int,
) -> Iterator[Measured]:
    """Each after a warm-up. `tokens`: batches of the linear; `contexts`: tokens that attention looks back on.

    Raises:
        ConfigError: the largest of them does not fit into the memory that is free.
    """
    _check_memory(shape, tokens, contexts)
    sample = _Sampler(threads, repetitions)
    for fmt in FORMATS:
        yield from _linears(sample, isas, shape, fmt, tokens)
    for fmt in ("float32", "bfloat16", "int8"):
        yield from _activations(sample, isas, shape, fmt, max(tokens))
    for fmt in CACHES:
        for context in contexts:
            yield from _attentions(sample, isas, shape, fmt, context)


@dataclass(frozen=True)
class _Sampler:
    threads: int
    repetitions: int

    def __call__(self, step: Step) -> list[float]:
        """At least one sample after the warm-up, then until SECONDS or the repetitions are used up."""
        step()
        end, seconds = time.perf_counter() + SECONDS, [step()]
        while len(seconds) < self.repetitions and time.perf_counter() < end:
            seconds.append(step())
        return seconds


def _check_memory(shape: Shape, tokens: Sequence[int], contexts: Sequence[int]) -> None:
    buffers = max(tokens) * (shape.rows + shape.cols) + max(contexts) * shape.head_dim * shape.heads * 3
    cache = 8 * max(contexts) * shape.kv_heads * shape.head_dim
    needed = 2 * STREAMED_BYTES + 4 * (shape.rows * shape.cols + buffers) + cache
    if needed > (free := available_memory()):
        raise ConfigError(
            f"rows, cols, tokens, context: got {shape.rows} x {shape.cols} for {max(tokens)} tokens, and "
            f"attention over {max(contexts)}, which take {needed / 1e9:.1f} GB, allowed {free / 1e9:.1f} GB, "
            "the memory that is free"
        )


def _linears(
    sample: _Sampler, isas: Sequence[str], shape: Shape, fmt: str, tokens: Sequence[int]
) -> Iterator[Measured]:
    """[tokens, cols] times [rows, cols] transposed; the quantisation of the activations is part of it."""
    nbytes = _native.packed_bytes(fmt, shape.rows, shape.cols)
    copies = -(-STREAMED_BYTES // nbytes)
    padded_rows = -(-shape.rows // BLOCK_ROWS) * BLOCK_ROWS
    weights = made_matrix(fmt, padded_rows * copies, shape.cols).reshape(copies, nbytes)
    for isa in isas:
        for count in tokens:
            used = weights if count <= FEW_TOKENS else weights[:1]
            step = _linear_step(sample.threads, isa, fmt, shape.rows, shape.cols, count, list(used))
            yield Measured(
                "linear",
                isa,
                fmt,
                f"{shape.rows} x {shape.cols}",
                count,
                nbytes,
                2.0 * count * shape.rows * shape.cols,
                sample(step),
            )


def _activations(
    sample: _Sampler, isas: Sequence[str], shape: Shape, fmt: str, tokens: int
) -> Iterator[Measured]:
    """float32 rows become what a matrix of `fmt` is multiplied with. One block of rows is multiplied, too."""
    weight = made_matrix(fmt, BLOCK_ROWS, shape.cols)
    for isa in isas:
        step = _linear_step(sample.threads, isa, fmt, BLOCK_ROWS, shape.cols, tokens, [weight] * 8)
        yield Measured(
            "activate", isa, fmt, f"{shape.cols}", tokens, 4.0 * tokens * shape.cols, 0.0, sample(step)
        )


def _linear_step(
    threads: int, isa: str, fmt: str, rows: int, cols: int, tokens: int, weights: Sequence[Any]
) -> Step:
    """A plan of the products of random rows with each of `weights`."""
    blocks = -(-tokens // BLOCK_SIZE)
    plan = _native.Plan(threads, isa, tokens, 1, 1, 16, "float32", 1, blocks, BLOCK_SIZE)
    x, out = plan.buffer(cols), plan.buffer(rows)
    table = _embed(plan, tokens, cols, x)
    for weight in weights:
        plan.linear(x, None, 0.0, [(weight, fmt, rows, cols, None)], "store", out)
    _end(plan, x, cols)
    ends = np.array([0, tokens], np.int32)
    arguments = _arguments(tokens, ends, ends[1:], np.arange(blocks, dtype=np.int32)[None], head_dim=16)
    return _timed(plan, arguments, len(weights), table)


def _attentions(
    sample: _Sampler, isas: Sequence[str], shape: Shape, fmt: str, context: int
) -> Iterator[Measured]:
    """One token that looks back on `context`, and a prompt of that length; with rotation and cache writes."""
    block_bytes = _native.cache_block_bytes(fmt, 1, shape.kv_heads, shape.head_dim, BLOCK_SIZE)
    layer_bytes = block_bytes * context // BLOCK_SIZE
    pair = 4.0 * shape.heads * shape.head_dim  # operations for a query and a key: q k and p v
    for isa in isas:
        layers = -(-STREAMED_BYTES // layer_bytes)
        decode = _Attention(sample.threads, isa, shape, fmt, context, layers, max_tokens=BLOCK_SIZE * 16)
        decode.fill()
        step = decode.step(1)
        yield Measured(
            "attention",
            isa,
            fmt,
            f"context {context}",
            1,
            layer_bytes,
            pair * context,
            sample(decode.step(1)),
        )
        del decode, step
        prefill = _Attention(sample.threads, isa, shape, fmt, context, 1, max_tokens=context)
        pairs = context * (context + 1) / 2
        yield Measured(
            "attention",
            isa,
            fmt,
            f"prompt {context}",
            context,
            layer_bytes,
            pair * pairs,
            sample(prefill.step(context)),
        )


class _Attention:
    """A plan of `layers` attentions with a cache each, for one sequence of `context` tokens."""

    def __init__(
        self, threads: int, isa: str, shape: Shape, fmt: str, context: int, layers: int, max_tokens: int
    ) -> None:
        self._context, self._layers, self._head_dim = context, layers, shape.head_dim
        self._blocks = -(-context // BLOCK_SIZE)
        self._max_tokens = max_tokens
        self._plan = _native.Plan(
            threads, isa, max_tokens, shape.heads, shape.kv_heads, shape.head_dim, fmt, layers,
            self._blocks, BLOCK_SIZE,
        )  # fmt: skip
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        qkv, out = self._plan.buffer(width), self._plan.buffer(shape.heads * shape.head_dim)
        self._table = _embed(self._plan, max_tokens, width, qkv)
        for layer in range(layers):
            self._plan.attention(qkv, layer, None, None, 0.0, shape.head_dim, shape.head_dim**-0.5, out)
        _end(self._plan, qkv, width)

    def fill(self) -> None:
        """Each block as a short sequence of its own: memory that was never written would be read for free."""
        together = self._max_tokens // BLOCK_SIZE
        for first in range(0, self._blocks, together):
            blocks = np.arange(first, min(first + together, self._blocks), dtype=np.int32)[:, None]
            ends = np.arange(len(blocks) + 1, dtype=np.int32) * BLOCK_SIZE
            lengths = np.full(len(blocks), BLOCK_SIZE, np.int32)
            self._plan.run(*_arguments(int(ends[-1]), ends, lengths, blocks, self._head_dim))

    def step(self, tokens: int) -> Step:
        blocks = np.arange(self._blocks, dtype=np.int32)[None]
        ends, lengths = np.array([0, tokens], np.int32), np.array([self._context], np.int32)
        arguments = _arguments(tokens, ends, lengths, blocks, self._head_dim)
        return _timed(self._plan, arguments, self._layers, self._table)


def _embed(plan: Any, tokens: int, width: int, out: int) -> np.ndarray:
    table = np.random.default_rng(0).standard_normal((tokens, width), np.float32)
    plan.embed(table.view(np.uint8).ravel(), "float32", tokens, width, out)
    return table


def _end(plan: Any, x: int, cols: int) -> None:
    """A plan ends in logits; no row asks for them."""
    plan.logits(x, None, 0.0, made_matrix("float32", 1, cols), "float32", 1, cols)


def _arguments(
    tokens: int, seq_starts: np.ndarray, context_lens: np.ndarray, block_tables: np.ndarray, head_dim: int
) -> tuple[np.ndarray, ...]:
    ids = np.arange(tokens, dtype=np.int32)
    cos, sin = np.ones((tokens, head_dim // 2), np.float32), np.zeros((tokens, head_dim // 2), np.float32)
    return (ids, seq_starts, context_lens, block_tables, ids[:0], cos, sin)


def _timed(plan: Any, arguments: tuple[np.ndarray, ...], calls: int, *alive: Any) -> Step:
    def step() -> float:
        start = time.perf_counter()
        plan.run(*arguments)
        return (time.perf_counter() - start) / calls

    return step

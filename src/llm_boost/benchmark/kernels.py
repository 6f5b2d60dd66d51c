"""One linear of each format and number of tokens, through the plan that the engine runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm_boost import _native
from llm_boost.benchmark.dummy import made_matrix
from llm_boost.engine.hardware import available_memory
from llm_boost.errors import ConfigError
from llm_boost.models.packing import BLOCK_ROWS

FORMATS = ("float32", "bfloat16", "int8", "int6", "int4")
BLOCK_SIZE = 16
# A step passes through so many bytes of weights that no cache has them from the step before. Beyond
# FEW_TOKENS arithmetic is the limit, and one matrix will do.
STREAMED_BYTES = 256 << 20
FEW_TOKENS = 16


@dataclass(frozen=True)
class Product:
    """[tokens, cols] times [rows, cols] transposed; `seconds` has a sample for each repetition."""

    isa: str
    format: str
    rows: int
    cols: int
    tokens: int
    seconds: list[float]

    @property
    def bytes_per_second(self) -> float:
        """Of weights, as packed."""
        return _native.packed_bytes(self.format, self.rows, self.cols) / statistics.median(self.seconds)

    @property
    def operations_per_second(self) -> float:
        return 2 * self.tokens * self.rows * self.cols / statistics.median(self.seconds)


def measure_kernels(
    isas: Sequence[str], rows: int, cols: int, tokens: Sequence[int], threads: int, repetitions: int
) -> Iterator[Product]:
    """Each product after a warm-up; the time includes the quantisation of the activations.

    Raises:
        ConfigError: the largest of them does not fit into the memory that is free.
    """
    needed = STREAMED_BYTES + 4 * (rows * cols + max(tokens) * (rows + cols))
    if needed > (free := available_memory()):
        raise ConfigError(
            f"rows, cols, tokens: got {rows} x {cols} for {max(tokens)} tokens, which take "
            f"{needed / 1e9:.1f} GB, allowed {free / 1e9:.1f} GB, the memory that is free"
        )
    for fmt in FORMATS:
        nbytes = _native.packed_bytes(fmt, rows, cols)
        copies = -(-STREAMED_BYTES // nbytes)
        padded_rows = -(-rows // BLOCK_ROWS) * BLOCK_ROWS
        weights = made_matrix(fmt, padded_rows * copies, cols).reshape(copies, nbytes)
        for isa in isas:
            for count in tokens:
                step = _Step(
                    weights if count <= FEW_TOKENS else weights[:1], fmt, rows, cols, count, isa, threads
                )
                step()
                yield Product(isa, fmt, rows, cols, count, [step() for _ in range(repetitions)])


class _Step:
    """A plan of the products of random rows with each of `weights` [copies, bytes]."""

    def __init__(
        self, weights: NDArray[np.uint8], fmt: str, rows: int, cols: int, tokens: int, isa: str, threads: int
    ) -> None:
        blocks = -(-tokens // BLOCK_SIZE)
        self._copies = len(weights)
        self._plan = _native.Plan(threads, isa, tokens, 1, 1, 16, "float32", 1, blocks, BLOCK_SIZE)
        x, out = self._plan.buffer(cols), self._plan.buffer(rows)
        table = np.random.default_rng(0).standard_normal((tokens, cols), np.float32)
        self._plan.embed(table.view(np.uint8).ravel(), "float32", tokens, cols, x)
        for weight in weights:
            self._plan.linear(x, None, 0.0, [(weight, fmt, rows, cols, None)], "store", out)
        # A plan ends in logits; no row asks for them.
        self._plan.logits(x, None, 0.0, made_matrix("float32", 1, cols), "float32", 1, cols)
        ids, ends = np.arange(tokens, dtype=np.int32), np.array([0, tokens], np.int32)
        rope, places = np.zeros((tokens, 8), np.float32), np.arange(blocks, dtype=np.int32)[None]
        self._arguments = (ids, ends, ends[1:], places, ids[:0], rope, rope)

    def __call__(self) -> float:
        """Seconds for one product."""
        start = time.perf_counter()
        self._plan.run(*self._arguments)
        return (time.perf_counter() - start) / self._copies

"""One linear of each format and number of tokens, through the plan that the engine runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llm_boost import _native
from llm_boost.benchmark.dummy import made_matrix

FORMATS = ("float32", "bfloat16", "int8", "int6", "int4")
BLOCK_SIZE = 16


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
    """Each product after a warm-up; the time includes the quantisation of the activations."""
    for fmt in FORMATS:
        weight = made_matrix(fmt, rows, cols)
        for isa in isas:
            for count in tokens:
                run = _Step(weight, fmt, rows, cols, count, isa, threads)
                run()
                yield Product(isa, fmt, rows, cols, count, [run() for _ in range(repetitions)])


class _Step:
    """The plan of a model without layers: a table of random rows, and the weight as its head."""

    def __init__(
        self, weight: np.ndarray, fmt: str, rows: int, cols: int, tokens: int, isa: str, threads: int
    ) -> None:
        self._plan = _native.Plan(
            threads, isa, tokens, 1, 1, 16, "float32", 1, -(-tokens // BLOCK_SIZE), BLOCK_SIZE
        )
        table = np.random.default_rng(0).standard_normal((tokens, cols), np.float32)
        x = self._plan.buffer(cols)
        self._plan.embed(table.view(np.uint8).ravel(), "float32", tokens, cols, x)
        self._plan.logits(x, None, 0.0, weight, fmt, rows, cols)
        ids, rope = np.arange(tokens, dtype=np.int32), np.zeros((tokens, 8), np.float32)
        ends = np.array([0, tokens], np.int32)
        blocks = np.arange(-(-tokens // BLOCK_SIZE), dtype=np.int32)[None]
        self._step = (ids, ends, ends[1:], blocks, ids, rope, rope)

    def __call__(self) -> float:
        start = time.perf_counter()
        self._plan.run(*self._step)
        return time.perf_counter() - start

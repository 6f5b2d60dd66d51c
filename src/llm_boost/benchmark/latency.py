"""Prefill and decode of the engine's step alone: no tokenizer, scheduler or sampler, fixed random tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_boost.benchmark.dummy import planned_bytes
from llm_boost.benchmark.subject import MADE_DTYPE, Room, Subject
from llm_boost.engine.batch import Batch, Int32Array
from llm_boost.engine.hardware import available_memory
from llm_boost.engine.native_runner import (
    DEFAULT_BLOCK_SIZE,
    NativeRunner,
    Progress,
    cache_block_bytes,
    resolve_kv_cache_dtype,
)
from llm_boost.errors import ConfigError
from llm_boost.models.config import ModelConfig

CHUNK = 512  # tokens of a prefill step, as in serving
MEMORY_SHARE = 0.9  # of what is free, for weights and caches
WARM_UP_SECONDS = 3.0  # a longer warm-up warms nothing more


@dataclass(frozen=True)
class Case:
    """One row: `tokens` of prefill, or as many decode steps of `batch` sequences, after `depth` tokens."""

    kind: str  # pp: prefill, tg: decode
    tokens: int
    depth: int
    batch: int

    @property
    def blocks(self) -> int:
        """Of the cache, each sequence having its own."""
        return self.batch * -(-(self.depth + self.tokens) // DEFAULT_BLOCK_SIZE)

    @property
    def name(self) -> str:
        """As llama-bench writes it: `tg64 @ d1024`; more than one sequence adds its number: `x16`."""
        return (
            f"{self.kind}{self.tokens}"
            + (f" x{self.batch}" if self.batch > 1 else "")
            + (f" @ d{self.depth}" if self.depth else "")
        )


@dataclass(frozen=True)
class Result:
    """One case on one subject: the time of each repetition, and how it used the machine on average."""

    case: Case
    subject: Subject
    seconds: list[float]

    @property
    def tokens_per_second(self) -> list[float]:
        return [self.case.batch * self.case.tokens / s for s in self.seconds]

    @property
    def bytes_per_second(self) -> float:
        """Weights and cached keys and values that were read; each chunk of a prompt reads the layers once."""
        case, subject = self.case, self.subject
        if case.kind == "tg":
            mean_context = case.depth + (case.tokens + 1) / 2
            step = subject.layer_bytes + subject.head_bytes + case.batch * mean_context * subject.token_bytes
            return step * case.tokens / statistics.mean(self.seconds)
        ends = [stop for _, stop in _chunks(case.depth, case.depth + case.tokens)]
        read = len(ends) * subject.layer_bytes + subject.head_bytes + sum(ends) * subject.token_bytes
        return read / statistics.mean(self.seconds)

    @property
    def operations_per_second(self) -> float:
        """Of the matrices: in the layers for every token, in the head for those whose logits are wanted."""
        case, subject = self.case, self.subject
        if case.kind == "tg":
            operations = (subject.layer_operations + subject.head_operations) * case.batch * case.tokens
        else:
            operations = subject.layer_operations * case.tokens + subject.head_operations
        return operations / statistics.mean(self.seconds)


def make_cases(
    pp: Sequence[int],
    pp_depths: Sequence[int],
    tg: Sequence[int],
    depths: Sequence[int],
    batches: Sequence[int],
) -> list[Case]:
    """Prefill first, then decode; what fills the cache least comes first, as time may not do for all."""
    prefill = [Case("pp", tokens, depth, 1) for depth in pp_depths for tokens in pp]
    decode = [Case("tg", tokens, depth, batch) for tokens in tg for depth in depths for batch in batches]
    return sorted(prefill, key=lambda case: case.depth) + sorted(
        decode, key=lambda case: (case.depth * case.batch, case.depth, case.batch)
    )


def fitting_cases(
    cases: Sequence[Case], config: ModelConfig, dtypes: Sequence[str], kv_cache_dtype: str = "auto"
) -> tuple[list[Case], dict[Case, str]]:
    """The cases that model and memory have room for, and why the others have to be left out.

    Raises:
        ConfigError: none of them fits.
    """
    names = [MADE_DTYPE if dtype == "auto" else dtype for dtype in dtypes]
    weights = sum(planned_bytes(config, name) for name in names)
    memory = int(MEMORY_SHARE * available_memory()) - weights
    caches = [resolve_kv_cache_dtype(kv_cache_dtype, name) for name in names]
    block = sum(cache_block_bytes(config, cache, DEFAULT_BLOCK_SIZE) for cache in caches)
    reasons = {}
    for case in cases:
        length, cache = case.depth + case.tokens, block * case.blocks
        if length > config.max_model_len:
            reasons[case] = f"{length} tokens, and the model was made for {config.max_model_len}"
        elif cache > memory:
            reasons[case] = f"its cache takes {cache / 1e9:.1f} GB, {max(memory, 0) / 1e9:.1f} GB are free"
    fitting = [case for case in cases if case not in reasons]
    if not fitting:
        raise ConfigError(f"no test fits; {cases[0].name}: {reasons[cases[0]]}")
    return fitting, reasons


def room_for(cases: Sequence[Case]) -> Room:
    """A runner's sizes, such that each case just fits."""
    return {
        "max_model_len": max(case.depth + case.tokens for case in cases),
        "block_size": DEFAULT_BLOCK_SIZE,
        "num_blocks": max(case.blocks for case in cases),
        "max_num_batched_tokens": max(CHUNK, *(case.batch for case in cases)),
    }


@dataclass
class _Bench:
    """A subject at work: what its cache holds, and what was learnt of its pace."""

    subject: Subject
    filled: int = 0  # blocks, from the first on, whose keys and values are there
    prefill_seconds: float = 0.0  # of a token; 0 until one has run
    step_seconds: float = 0.0  # of decode, of one sequence

    def fill(self, case: Case) -> None:
        """Real keys and values below the case's depth: memory that was never written would be read for free.

        Each block is filled as a short prompt of its own: what its tokens attended to changes no speed.
        """
        end = case.blocks if case.depth else 0
        for start in range(self.filled, end, CHUNK // DEFAULT_BLOCK_SIZE):
            blocks = np.arange(start, min(start + CHUNK // DEFAULT_BLOCK_SIZE, end), dtype=np.int32)
            step = _step(self.subject.runner, blocks[:, None], 0, DEFAULT_BLOCK_SIZE)
            self.prefill_seconds = _run(self.subject.runner, [step]) / len(step.token_ids)
        self.filled = max(self.filled, end)

    def warm_up(self, steps: Sequence[Batch]) -> None:
        end = time.perf_counter() + WARM_UP_SECONDS
        for step in steps:
            self.subject.runner.run(step)
            if time.perf_counter() > end:
                break

    def run(self, case: Case, steps: Sequence[Batch]) -> float:
        seconds = _run(self.subject.runner, steps)
        if case.kind == "pp":
            self.prefill_seconds = seconds / case.tokens
        elif case.batch == 1:
            self.step_seconds = seconds / case.tokens
        return seconds

    def estimate(self, case: Case, repetitions: int) -> float:
        """Seconds that a case will take; too few while nothing like it has run."""
        unfilled = max(0, case.blocks - self.filled) if case.depth else 0
        fill = unfilled * DEFAULT_BLOCK_SIZE * self.prefill_seconds
        step = max(self.step_seconds, case.batch * self.prefill_seconds)
        once = case.tokens * (self.prefill_seconds if case.kind == "pp" else step)
        return fill + min(once, WARM_UP_SECONDS) + repetitions * once


def measure(
    subjects: Sequence[Subject],
    cases: Sequence[Case],
    repetitions: int,
    *,
    seconds: float = float("inf"),
    progress: Progress | None = None,
) -> tuple[list[Result], dict[Case, float]]:
    """Each case on every subject: a warm-up, then the repetitions, subject by subject in turn.

    A machine drifts, and a drift that meets all subjects alike does not change their order. Cases that would
    end after `seconds` are left out; they are the second value, with the seconds that each might take.
    """
    start = time.perf_counter()
    benches = [_Bench(subject) for subject in subjects]
    results: list[Result] = []
    left_out: dict[Case, float] = {}
    for done, case in enumerate(cases):
        expected = sum(bench.estimate(case, repetitions) for bench in benches)
        if time.perf_counter() - start + expected > seconds:
            left_out[case] = expected
        else:
            results += _measure_case(benches, case, repetitions)
        if progress:
            progress(done + 1, len(cases))
    return results, left_out


def _measure_case(benches: Sequence[_Bench], case: Case, repetitions: int) -> list[Result]:
    steps = [_batches(case, bench.subject.runner) for bench in benches]
    for bench, its in zip(benches, steps, strict=True):
        bench.fill(case)
        bench.warm_up(its)
    seconds = [
        [bench.run(case, its) for bench, its in zip(benches, steps, strict=True)] for _ in range(repetitions)
    ]
    return [
        Result(case, bench.subject, list(times))
        for bench, times in zip(benches, zip(*seconds, strict=True), strict=True)
    ]


def _chunks(start: int, stop: int) -> list[tuple[int, int]]:
    return [(i, min(i + CHUNK, stop)) for i in range(start, stop, CHUNK)]


def _run(runner: NativeRunner, steps: Sequence[Batch]) -> float:
    start = time.perf_counter()
    for step in steps:
        runner.run(step)
    return time.perf_counter() - start


def _batches(case: Case, runner: NativeRunner) -> list[Batch]:
    tables = np.arange(case.blocks, dtype=np.int32).reshape(case.batch, -1)
    if case.kind == "tg":
        return [_step(runner, tables, case.depth + i, 1, logits=True) for i in range(case.tokens)]
    end = case.depth + case.tokens
    return [_step(runner, tables, i, j - i, logits=j == end) for i, j in _chunks(case.depth, end)]


def _step(
    runner: NativeRunner, block_tables: Int32Array, start: int, count: int, *, logits: bool = False
) -> Batch:
    """`count` random tokens for each of the sequences in `block_tables`, after the `start` that it has."""
    n = len(block_tables)
    ends = np.arange(1, n + 1, dtype=np.int32) * count
    return Batch(
        token_ids=np.random.default_rng(start).integers(0, runner.vocab_size, n * count, np.int32),
        seq_starts=np.concatenate([[0], ends]).astype(np.int32),
        context_lens=np.full(n, start + count, np.int32),
        prompt_lens=np.full(n, start + count, np.int32),
        block_tables=block_tables,
        logit_rows=(ends - 1 if logits else ends[:0]).astype(np.int32),
    )

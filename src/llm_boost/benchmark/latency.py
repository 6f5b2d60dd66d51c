"""Prefill and decode of the engine's step alone: no tokenizer, scheduler or sampler, fixed random tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llm_boost.benchmark.subject import Room, Subject
from llm_boost.engine.batch import Batch
from llm_boost.engine.native_runner import DEFAULT_BLOCK_SIZE, NativeRunner, Progress
from llm_boost.errors import ConfigError
from llm_boost.models.config import ModelConfig

CHUNK = 512  # tokens of a prefill step, as in serving
WARM_UP_SECONDS = 3.0  # a longer warm-up warms nothing more


@dataclass(frozen=True)
class Case:
    """One row: `tokens` of prefill, or as many decode steps of `batch` sequences, after `depth` tokens."""

    kind: str  # pp: prefill, tg: decode
    tokens: int
    depth: int
    batch: int

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


def room_for(cases: Sequence[Case], config: ModelConfig) -> Room:
    """A runner's sizes, such that each case just fits; ConfigError for one longer than the model."""
    length = max(case.depth + case.tokens for case in cases)
    if length > config.max_model_len:
        raise ConfigError(
            f"depth: the longest test takes {length} tokens, allowed at most {config.max_model_len}, "
            "the length that the model was made for"
        )
    sequences = max(case.batch for case in cases)
    return {
        "max_model_len": length,
        "block_size": DEFAULT_BLOCK_SIZE,
        "num_blocks": sequences * _blocks(length),
        "max_num_batched_tokens": max(CHUNK, sequences),
    }


@dataclass
class _Bench:
    """A subject at work: what its cache holds, and what was learnt of its pace."""

    subject: Subject
    filled: dict[int, int] = field(default_factory=dict)  # sequence -> blocks whose keys and values are there
    prefill_seconds: float = 0.0  # of a token; 0 until one has run
    step_seconds: float = 0.0  # of decode, of one sequence

    def fill(self, case: Case) -> None:
        """Real keys and values below the case's depth: memory that was never written would be read for free.

        Each block is filled as a short prompt of its own: what its tokens attended to changes no speed.
        """
        todo = self._unfilled(case)
        for i in range(0, len(todo), CHUNK // DEFAULT_BLOCK_SIZE):
            blocks = todo[i : i + CHUNK // DEFAULT_BLOCK_SIZE]
            step = _step(self.subject.runner, np.array(blocks, np.int32)[:, None], 0, DEFAULT_BLOCK_SIZE)
            self.prefill_seconds = _run(self.subject.runner, [step]) / len(step.token_ids)
        self.filled |= {sequence: _blocks(case.depth) for sequence in self._shallower(case)}

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
        fill = len(self._unfilled(case)) * DEFAULT_BLOCK_SIZE * self.prefill_seconds
        step = max(self.step_seconds, case.batch * self.prefill_seconds)
        once = case.tokens * (self.prefill_seconds if case.kind == "pp" else step)
        return fill + min(once, WARM_UP_SECONDS) + repetitions * once

    def _shallower(self, case: Case) -> list[int]:
        return [s for s in range(case.batch) if self.filled.get(s, 0) < _blocks(case.depth)]

    def _unfilled(self, case: Case) -> list[int]:
        own = _blocks(self.subject.runner.max_model_len)
        return [
            sequence * own + block
            for sequence in self._shallower(case)
            for block in range(self.filled.get(sequence, 0), _blocks(case.depth))
        ]


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


def _blocks(tokens: int) -> int:
    return -(-tokens // DEFAULT_BLOCK_SIZE)


def _chunks(start: int, stop: int) -> list[tuple[int, int]]:
    return [(i, min(i + CHUNK, stop)) for i in range(start, stop, CHUNK)]


def _run(runner: NativeRunner, steps: Sequence[Batch]) -> float:
    start = time.perf_counter()
    for step in steps:
        runner.run(step)
    return time.perf_counter() - start


def _batches(case: Case, runner: NativeRunner) -> list[Batch]:
    own = _blocks(runner.max_model_len)  # each sequence has its own blocks
    tables = np.arange(case.batch * own, dtype=np.int32).reshape(case.batch, own)
    if case.kind == "tg":
        return [_step(runner, tables, case.depth + i, 1, logits=True) for i in range(case.tokens)]
    end = case.depth + case.tokens
    return [_step(runner, tables, i, j - i, logits=j == end) for i, j in _chunks(case.depth, end)]


def _step(
    runner: NativeRunner, block_tables: np.ndarray, start: int, count: int, *, logits: bool = False
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

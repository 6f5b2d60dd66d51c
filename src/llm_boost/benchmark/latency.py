"""Prefill and decode of the engine's step alone: no tokenizer, scheduler or sampler, fixed random tokens."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llm_boost.benchmark.dummy import dummy_model
from llm_boost.checkpoint import open_checkpoint
from llm_boost.checkpoint.fields import read_json_object
from llm_boost.engine.batch import Batch
from llm_boost.engine.hardware import default_threads
from llm_boost.engine.native_runner import (
    DEFAULT_BLOCK_SIZE,
    NativeRunner,
    Progress,
    cache_block_bytes,
    choose_isa,
    resolve_kv_cache_dtype,
)
from llm_boost.errors import ConfigError
from llm_boost.models.config import ModelConfig, expected_tensors

CHUNK = 512  # tokens of a prefill step, as in serving


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


@dataclass
class Subject:
    """A model at one dtype, loaded."""

    runner: NativeRunner
    load_seconds: float | None  # with a warm packed cache; None for made weights
    filled: dict[int, int] = field(default_factory=dict)  # sequence -> tokens whose keys and values are there

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in expected_tensors(self.runner.config).values())

    @property
    def prefill_operations(self) -> int:
        """Of one token: 2 for each element of the layers' matrices (the head sees the last token only)."""
        shapes = expected_tensors(self.runner.config)
        return 2 * sum(math.prod(s) for name, s in shapes.items() if ".layers." in name and len(s) == 2)

    def step_bytes(self, case: Case) -> float:
        """Read by a decode step: every weight but the embedding table, and the cache at its mean length."""
        token_bytes = cache_block_bytes(self.runner.config, self.runner.kv_cache_dtype, 1)
        context = case.depth + (case.tokens + 1) / 2
        return self.runner.weight_bytes - self.runner.embedding_bytes + case.batch * context * token_bytes


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
    def rate(self) -> float:
        """Bytes a second for decode, operations a second for prefill."""
        if self.case.kind == "tg":
            return self.subject.step_bytes(self.case) * self.case.tokens / statistics.mean(self.seconds)
        operations = self.subject.prefill_operations * self.case.tokens
        return operations / statistics.mean(self.seconds)


def make_cases(
    pp: Sequence[int], tg: Sequence[int], depths: Sequence[int], batches: Sequence[int]
) -> list[Case]:
    """Shallow before deep, so that what one case leaves in the cache serves the next."""
    return [
        case
        for depth in sorted(depths)
        for case in (
            *(Case("pp", n, depth, 1) for n in pp),
            *(Case("tg", n, depth, batch) for n in tg for batch in batches),
        )
    ]


def load_subject(
    path: Path,
    cases: Sequence[Case],
    *,
    dtype: str,
    kv_cache_dtype: str = "auto",
    dummy: bool,
    threads: int | None,
    cache_dir: Path,
    progress: Progress | None = None,
) -> Subject:
    """Loads `path` (with `dummy` its config.json alone) with a cache that just holds the cases.

    Raises:
        CheckpointError: the model cannot be read. ConfigError: a case is longer than the model or the memory.
    """
    if dummy:
        return Subject(_make(path, cases, dtype, kv_cache_dtype, threads), None)

    def load() -> NativeRunner:
        checkpoint = open_checkpoint(path)
        source = path / "config.json" if path.is_dir() else path
        config = ModelConfig.from_hf(checkpoint.config, str(source), checkpoint.tensors)
        room = _room(cases, config)
        return NativeRunner.load(
            checkpoint,
            config,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            threads=threads,
            cache_dir=cache_dir,
            progress=progress,
            **room,
        )

    load()  # packs the weights if the cache lacks them
    start = time.perf_counter()
    return Subject(load(), time.perf_counter() - start)


def _make(
    path: Path, cases: Sequence[Case], dtype: str, kv_cache_dtype: str, threads: int | None
) -> NativeRunner:
    if not path.is_dir():
        raise ConfigError(f"load_format: got dummy with {path}, allowed a directory with a config.json")
    source = path / "config.json"
    config = ModelConfig.from_hf(read_json_object(source), str(source))
    room, dtype = _room(cases, config), "bfloat16" if dtype == "auto" else dtype
    kv_cache_dtype = resolve_kv_cache_dtype(kv_cache_dtype, dtype)
    cache_bytes = room["num_blocks"] * cache_block_bytes(config, kv_cache_dtype, DEFAULT_BLOCK_SIZE)
    return NativeRunner(
        config,
        dummy_model(config, dtype, cache_bytes),
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        threads=threads or default_threads(),
        isa=choose_isa(),
        **room,
    )


def _room(cases: Sequence[Case], config: ModelConfig) -> dict[str, int]:
    """A runner's sizes, such that each case just fits."""
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


def measure(
    subjects: Sequence[Subject], cases: Sequence[Case], repetitions: int, progress: Progress | None = None
) -> list[Result]:
    """Each case on every subject: a warm-up, then the repetitions, subject by subject in turn.

    A machine drifts, and a drift that meets all subjects alike does not change their order.
    """
    results = []
    for done, case in enumerate(cases):
        batches = [_batches(case, subject.runner) for subject in subjects]
        for subject, steps in zip(subjects, batches, strict=True):
            _fill(subject, case)
            _run(subject.runner, steps)
        seconds = [
            [_run(subject.runner, steps) for subject, steps in zip(subjects, batches, strict=True)]
            for _ in range(repetitions)
        ]
        results += [
            Result(case, subject, list(times))
            for subject, times in zip(subjects, zip(*seconds, strict=True), strict=True)
        ]
        if progress:
            progress(done + 1, len(cases))
    return results


def _blocks(tokens: int) -> int:
    return -(-tokens // DEFAULT_BLOCK_SIZE)


def _run(runner: NativeRunner, steps: Sequence[Batch]) -> float:
    start = time.perf_counter()
    for step in steps:
        runner.run(step)
    return time.perf_counter() - start


def _batches(case: Case, runner: NativeRunner) -> list[Batch]:
    if case.kind == "tg":
        sequences = range(case.batch)
        return [_step(runner, sequences, case.depth + i, 1, logits=True) for i in range(case.tokens)]
    return _prefill(runner, 0, case.depth, case.depth + case.tokens)


def _fill(subject: Subject, case: Case) -> None:
    """Real keys and values below the case's depth: memory that was never written would be read for free."""
    for sequence in range(case.batch):
        _run(subject.runner, _prefill(subject.runner, sequence, subject.filled.get(sequence, 0), case.depth))
        subject.filled[sequence] = max(case.depth, subject.filled.get(sequence, 0))


def _prefill(runner: NativeRunner, sequence: int, start: int, stop: int) -> list[Batch]:
    chunks = [(i, min(i + CHUNK, stop)) for i in range(start, stop, CHUNK)]
    return [_step(runner, [sequence], i, j - i, logits=j == stop) for i, j in chunks]


def _step(runner: NativeRunner, sequences: Sequence[int], start: int, count: int, *, logits: bool) -> Batch:
    """`count` random tokens for each sequence, after the `start` that it has."""
    n = len(sequences)
    ends = np.arange(1, n + 1, dtype=np.int32) * count
    blocks = _blocks(runner.max_model_len)  # each sequence has its own
    return Batch(
        token_ids=np.random.default_rng(start).integers(0, runner.vocab_size, n * count, np.int32),
        seq_starts=np.concatenate([[0], ends]).astype(np.int32),
        context_lens=np.full(n, start + count, np.int32),
        prompt_lens=np.full(n, start + count, np.int32),
        block_tables=np.stack([np.arange(s * blocks, (s + 1) * blocks, dtype=np.int32) for s in sequences]),
        logit_rows=(ends - 1 if logits else ends[:0]).astype(np.int32),
    )

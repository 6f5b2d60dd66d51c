"""Guesses of a smaller model, which keeps the sequences' keys and values in a cache of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequences
from typing import NamedTuple

from llm_boost.engine.batch import ModelRunner
from llm_boost.engine.block_manager import BlockManager
from llm_boost.engine.build_batch import build_batch
from llm_boost.engine.drafts import Drafting
from llm_boost.engine.scheduler import Chunk
from llm_boost.engine.sequence import Sequence

_FIRST_RATE = 0.6  # of right guesses, before any was made
_FIRST_PAUSE, _LAST_PAUSE = 16, 1024  # tokens until a sequence whose guesses did not pay is tried again


class _Job(NamedTuple):
    sequence: Sequence
    mirror: Sequence
    wanted: int


class DraftModel:
    """The likeliest tokens of a smaller model: of all sequences together, one of each in a step.

    A sequence has a mirror here, with the same tokens in the same memory and blocks of its own.

    Args:
        runner: of the smaller model.
        vocab_size: the larger one's.
        max_tokens: that a step of the runner may have.
    """

    def __init__(self, runner: ModelRunner, vocab_size: int, max_tokens: int) -> None:
        self._runner = runner
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self.seconds = 0.0  # of a step that guesses once, lately
        self.blocks = BlockManager(runner.num_blocks, runner.block_size, caching=False)
        self.mirrors: dict[tuple[int, int], Sequence] = {}

    def follow(self, sequences: Sequences[Sequence]) -> None:
        for order in self.mirrors.keys() - {sequence.order for sequence in sequences}:
            self.blocks.release(self.mirrors.pop(order))
        for sequence in sequences:
            guesses = sequence.drafting or _Guesses(sequence.num_tokens)
            assert isinstance(guesses, _Guesses)
            sequence.drafting = guesses
            guesses.compare(sequence)
            guesses.available = sequence.num_tokens >= guesses.resume

    def propose(self, wanted: Sequences[tuple[Sequence, int]]) -> None:
        jobs = [job for sequence, count in wanted if (job := self._job(sequence, count))]
        self._catch_up(jobs)
        while jobs:
            begins = [job.mirror.num_uncomputed for job in jobs]
            start = time.monotonic()
            logits = self._runner.run(
                build_batch([Chunk(job.mirror, n) for job, n in zip(jobs, begins, strict=True)])
            )
            tokens = logits[:, : self._vocab_size].argmax(axis=1).tolist()
            for (sequence, mirror, _), token in zip(jobs, tokens, strict=True):
                mirror.num_computed = mirror.num_tokens
                mirror.append(token)
                sequence.num_drafts += 1
            if max(begins) <= 2:  # not one that had to catch up
                self._measure(time.monotonic() - start)
            jobs = [job for job in jobs if job.sequence.num_drafts < job.wanted]
        for sequence, _ in wanted:
            assert isinstance(sequence.drafting, _Guesses)
            sequence.drafting.remember(sequence)

    def _job(self, sequence: Sequence, count: int) -> _Job | None:
        """The mirror as far as it is right, with blocks for what is to come; None where there is no room."""
        mirror = self.mirrors.get(sequence.order)
        if mirror is None:
            mirror = self.mirrors[sequence.order] = sequence.mirror()
        mirror.num_tokens = sequence.num_tokens
        mirror.num_computed = min(mirror.num_computed, sequence.num_computed)
        mirror.num_drafts = count
        sequence.num_drafts = 0
        if sequence.num_tokens + count > self._runner.max_model_len or not self.blocks.grow(mirror):
            return None
        mirror.num_drafts = 0
        return _Job(sequence, mirror, count)

    def _catch_up(self, jobs: list[_Job]) -> None:
        """Computes of the mirrors what would not fit into one step."""
        for _, mirror, _ in jobs:
            while mirror.num_uncomputed > self._max_tokens // len(jobs):
                chunk = Chunk(mirror, min(mirror.num_uncomputed - 1, self._max_tokens))
                self._runner.run(build_batch([chunk]))
                mirror.num_computed += chunk.num_tokens

    def _measure(self, seconds: float) -> None:
        self.seconds = seconds if self.seconds == 0 else self.seconds + 0.2 * (seconds - self.seconds)


class _Guesses(Drafting):
    """`start` is where the latest guesses began; `resume` the length at which they are tried again."""

    __slots__ = ("latest", "pause", "resume", "start")

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.first = self.later = _FIRST_RATE
        self.start = self.resume = num_tokens
        self.latest: list[int] = []
        self.pause = _FIRST_PAUSE

    def remember(self, sequence: Sequence) -> None:
        self.start = sequence.num_tokens
        self.latest = sequence.with_drafts(sequence.num_drafts)[self.start :].tolist()

    def compare(self, sequence: Sequence) -> None:
        """Learns from the tokens that came where it had guessed."""
        if self.start == sequence.num_tokens:
            return
        came = sequence.tokens[self.start :].tolist() if self.latest else []
        right = 0
        for guess, token in zip(self.latest, came, strict=False):
            self.learn(guess == token)
            if guess != token:
                break
            right += 1
        if self.latest and right:
            self.pause = _FIRST_PAUSE
        elif not self.latest and sequence.num_tokens >= self.resume:  # it was not worth a guess
            self.resume = sequence.num_tokens + self.pause
            self.pause = min(2 * self.pause, _LAST_PAUSE)
            self.first = self.later = _FIRST_RATE
            self.streak = False
        self.start, self.latest = sequence.num_tokens, []

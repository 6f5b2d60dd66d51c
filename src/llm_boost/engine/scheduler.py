"""Which tokens the next step computes: continuous batching with chunked prefill under one token budget."""

from __future__ import annotations

from bisect import insort
from operator import attrgetter
from typing import NamedTuple

from llm_boost.engine.block_manager import BlockManager
from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.engine.sequence import Sequence

_RANK = attrgetter("rank")


class Chunk(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Nothing stays uncomputed, so the logits of its last token give the sequence's next one."""
        return self.num_tokens == self.sequence.num_uncomputed


class Scheduler:
    """First come, first served, where "first" is a sequence's rank.

    Each step takes one token of every decoding sequence, then chunks of the prompts under way, then
    prompts that wait, until `max_num_batched_tokens` are taken or `max_num_seqs` sequences run. A sequence is
    admitted when there are blocks for all its tokens, and gets one more when a decode needs it. When there is
    none, the newest sequence gives up its blocks and waits to be computed again: the oldest always ends.
    """

    def __init__(self, blocks: BlockManager, config: SchedulerConfig) -> None:
        self.blocks = blocks
        self.config = config
        self.waiting: list[Sequence] = []  # both by rank
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_RANK)

    def finish(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.blocks.release(sequence)

    def schedule(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget = self.config.max_num_batched_tokens
        short_of_blocks = self._make_room()
        for sequence in sorted(self.running, key=lambda s: s.num_uncomputed > 1):  # decodes first
            if budget == 0:
                break
            budget -= self._take(sequence, budget, chunks)
        while budget > 0 and not short_of_blocks and (admitted := self._admit()):
            budget -= self._take(admitted, budget, chunks)
        return chunks

    def computed(self, chunks: list[Chunk]) -> None:
        """The step that was scheduled has run."""
        for sequence, num_tokens in chunks:
            sequence.num_computed += num_tokens
            self.blocks.publish(sequence, sequence.num_computed)

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Adds the sequence's next chunk; its tokens."""
        num_tokens = min(sequence.num_uncomputed, budget)
        chunks.append(Chunk(sequence, num_tokens))
        if num_tokens > 1:  # newcomers may read its blocks in this step already, see ModelRunner.run
            self.blocks.publish(sequence, sequence.num_computed + num_tokens, computed=False)
        return num_tokens

    def _make_room(self) -> bool:
        """Gives each running sequence its blocks, the oldest first; True if another lost its own for that."""
        preempted = False
        served = 0
        while served < len(self.running):
            if self.blocks.grow(self.running[served]):
                served += 1
            else:
                self._preempt(self.running.pop())
                preempted = True
        return preempted

    def _preempt(self, newest: Sequence) -> None:
        self.blocks.release(newest)
        self.add(newest)
        self.num_preemptions += 1

    def _admit(self) -> Sequence | None:
        """Moves the first waiting sequence to the running ones, if there is room."""
        if not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return None
        sequence = self.waiting[0]
        # One free block for each running sequence stays, or the newcomer would soon be preempted.
        if not self.blocks.admit(sequence, spare=len(self.running)):
            return None
        insort(self.running, self.waiting.pop(0), key=_RANK)
        return sequence

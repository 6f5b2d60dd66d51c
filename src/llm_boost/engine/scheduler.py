"""Which tokens the next step computes: continuous batching with chunked prefill under one token budget."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import NamedTuple

from llm_boost.engine.block_manager import BlockManager
from llm_boost.engine.policies import RANKS, PrefillFirst, SelectBatch
from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.engine.sequence import Sequence

# Of a prompt in a step, where each gives logits: a row of them is as wide as the vocabulary, 600 KB.
MAX_SCORED_TOKENS = 64


class Chunk(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a sequence; after all of them come drafts."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Nothing stays uncomputed, so the logits of its last token give the sequence's next one."""
        return self.num_tokens >= self.sequence.num_uncomputed

    @property
    def num_drafts(self) -> int:
        return max(0, self.num_tokens - self.sequence.num_uncomputed)

    @property
    def num_logits(self) -> int:
        """How many of its last tokens give logits: drafts do, and the token before them."""
        if self.sequence.is_scored:
            return 1 + self.num_drafts if self.is_last else 0
        end = self.sequence.num_computed + self.num_tokens
        return max(0, end - max(self.sequence.num_computed, self.sequence.logits_from))


class Scheduler:
    """First come, first served, where `policies` say who is first.

    A step of "Mix" takes a token of every decoding sequence, then chunks of the prompts under way, then
    prompts that wait; one of "Standard" takes the first of these, or the others. Both until
    `max_num_batched_tokens` are taken or `max_num_seqs` sequences run. A sequence is admitted when there are
    blocks for all its tokens, and gets one more when a decode needs it. When there is none, the last sequence
    gives up its blocks and waits to be computed again: the first always ends.
    """

    def __init__(self, blocks: BlockManager, config: SchedulerConfig) -> None:
        self.blocks = blocks
        self.config = config
        self.waiting: list[Sequence] = []  # both in order of rank
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._waiting_rank = RANKS[config.prefill_policy_type]
        self._running_rank = RANKS[config.decode_policy_type]
        self._prefill_is_due = (SelectBatch if config.support_select_batch else PrefillFirst)(config)
        self._batch = _PrefillBatch(0, None)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=self._waiting_rank)

    def finish(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.blocks.release(sequence)

    def schedule(self, now: float) -> list[Chunk]:
        """The chunks of a step that begins at `now`, on the clock of the sequences' arrivals."""
        self._make_way(now)
        short_of_blocks = self._make_room()
        size, most = self.config.prefill_batch_size, self.config.max_prefill_tokens
        prompts = [sequence for sequence in self.running if not sequence.is_decoding]
        if self.config.template_type == "Mix":
            chunks, budget = self._decode()
            self._batch = _PrefillBatch(size - len(prompts), None)
            budget = budget if most is None else min(budget, most)
            return chunks + self._prefill(prompts, budget, short_of_blocks)
        if not prompts and not self._prefill_is_due(self.waiting, self.running, now):
            return self._decode()[0]
        if not prompts:
            self._batch = _PrefillBatch(size, most)
        return (
            self._prefill(prompts, self.config.max_num_batched_tokens, short_of_blocks) or self._decode()[0]
        )

    def computed(self, chunks: list[Chunk]) -> None:
        """The step that was scheduled has run; what drafts are right is not known yet."""
        for sequence, num_tokens in chunks:
            sequence.num_computed += min(num_tokens, sequence.num_uncomputed)
            self.blocks.publish(sequence, sequence.num_computed)

    def _decode(self) -> tuple[list[Chunk], int]:
        """A token of each decoding sequence with its drafts, and the budget that is left."""
        chunks = [Chunk(s, 1 + s.num_drafts) for s in self.running if s.is_decoding]
        return chunks, self.config.max_num_batched_tokens - sum(chunk.num_tokens for chunk in chunks)

    def _prefill(self, prompts: list[Sequence], budget: int, short_of_blocks: bool) -> list[Chunk]:
        """Chunks of the prompts under way, then of those that are admitted."""
        chunks: list[Chunk] = []
        for sequence in prompts:
            budget -= self._take(sequence, budget, chunks)
        while budget > 0 and not short_of_blocks and (admitted := self._admit()):
            budget -= self._take(admitted, budget, chunks)
        return chunks

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Adds the sequence's next chunk, and says how many tokens it has."""
        num_tokens = min(sequence.num_uncomputed, budget)
        if not sequence.is_scored:
            num_tokens = min(num_tokens, MAX_SCORED_TOKENS)
        if num_tokens > 0:
            chunks.append(Chunk(sequence, num_tokens))
        if num_tokens > 1:  # newcomers may read its blocks in this step already, see ModelRunner.run
            self.blocks.publish(sequence, sequence.num_computed + num_tokens, computed=False)
        return num_tokens

    def _admit(self) -> Sequence | None:
        """Moves the first waiting sequence to the running ones, if there is room."""
        if not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return None
        sequence = self.waiting[0]
        # One free block for each running sequence stays, or the newcomer would soon be preempted.
        if not self._batch.has_room(sequence) or not self.blocks.admit(sequence, spare=len(self.running)):
            return None
        self._batch.add(sequence)
        insort(self.running, self.waiting.pop(0), key=self._running_rank)
        return sequence

    def _make_room(self) -> bool:
        """Gives each running sequence its blocks, the first ones first; True if one lost its own for that."""
        preempted = False
        served = 0
        while served < len(self.running):
            if self.blocks.grow(self.running[served]):
                served += 1
            elif self.running[served].num_drafts:
                self.running[served].num_drafts = 0
            else:
                last = self.running[-1]
                self._stop(last)
                self.add(last)
                preempted = True
        return preempted

    def _make_way(self, now: float) -> None:
        """Sets running sequences aside for one that has waited too long for its first token.

        Each at most once, and never the first, so that all go on.
        """
        if not self.config.max_preempt_count or not self.waiting:
            return
        head = self.waiting[0]
        waited = now - head.arrival
        if head.num_generated or waited < self.config.max_first_token_wait_time / 1000:
            return
        if self.blocks.fits(head, len(self.running)):
            return
        allowed = self.config.max_preempt_count - sum(sequence.set_aside for sequence in self.waiting)
        last = [sequence for sequence in self.running[:0:-1] if not sequence.set_aside][: max(allowed, 0)]
        for count in range(1, len(last) + 1):
            if self.blocks.fits(head, len(self.running) - count, instead_of=last[:count]):
                self._set_aside(last[:count])
                return

    def _set_aside(self, sequences: list[Sequence]) -> None:
        """Gives their place to the first that waits."""
        for sequence in sequences:
            sequence.set_aside = True
            self._stop(sequence)
        self._batch = _PrefillBatch(1, None)
        self._admit()
        for sequence in sequences:
            self.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence)
        self.num_preemptions += 1


@dataclass
class _PrefillBatch:
    """What a batch of prompts may still take in: sequences, and tokens if it has any limit."""

    sequences: int
    tokens: int | None
    empty: bool = True

    def has_room(self, sequence: Sequence) -> bool:
        if self.sequences < 1:
            return False
        return self.tokens is None or self.empty or sequence.num_tokens <= self.tokens

    def add(self, sequence: Sequence) -> None:
        self.empty = False
        self.sequences -= 1
        if self.tokens is not None:
            self.tokens -= sequence.num_tokens

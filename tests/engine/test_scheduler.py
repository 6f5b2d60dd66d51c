"""The block manager and the scheduler under random arrivals, aborts and pressure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm_boost.engine.block_manager import BlockManager
from llm_boost.engine.scheduler import Chunk, Scheduler
from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.engine.sequence import Sequence
from llm_boost.errors import EngineError


def make_sequence(
    order: tuple[int, int], prompt: int, output: int, block_size: int, salt: str | None = None
) -> Sequence:
    """Of tokens that no other order has."""
    tokens = np.arange(prompt, dtype=np.int32) + 1000 * order[0]
    return Sequence(order, tokens, output, -(-(prompt + output) // block_size), salt=salt)


class SchedulerMachine(RuleBasedStateMachine):
    """Prompts begin alike, so blocks are shared, exchanged, cached and evicted; what each holds is known."""

    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.integers(1, 5),
        budget=st.integers(1, 20),
        caching=st.booleans(),
        data=st.data(),
    )
    def start(
        self, num_blocks: int, block_size: int, budget: int, caching: bool, data: st.DataObject
    ) -> None:
        self.capacity = num_blocks * block_size
        self.blocks = BlockManager(num_blocks, block_size, caching=caching)
        self.scheduler = Scheduler(
            self.blocks,
            SchedulerConfig(max_num_seqs=data.draw(st.integers(1, budget)), max_num_batched_tokens=budget),
        )
        self.live: dict[tuple[int, int], Sequence] = {}
        self.contents: dict[tuple[int, int], object] = {}  # of each slot (block, offset): the text up to it
        self.number = 0

    @precondition(lambda self: self.capacity >= 2)
    @rule(data=st.data(), copies=st.sampled_from([1, 1, 1, 2, 5]), salt=st.sampled_from("aaab"))
    def arrive(self, data: st.DataObject, copies: int, salt: str) -> None:
        prompt = data.draw(st.integers(1, self.capacity - 1))
        output = data.draw(st.integers(1, self.capacity - prompt))
        differs = data.draw(st.integers(0, prompt))  # from here on
        tokens = np.array([0] * differs + [1] * (prompt - differs), np.int32)
        for index in range(copies):
            max_blocks = self.blocks.blocks_for(prompt + output)
            sequence = Sequence((self.number, index), tokens, output, max_blocks, salt=salt)
            self.live[sequence.order] = sequence
            self.scheduler.add(sequence)
        self.number += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.finish(self.live.pop(data.draw(st.sampled_from(sorted(self.live)))))

    @precondition(lambda self: self.live)
    @rule()
    def crash(self) -> None:
        """A model that fails ends the sequences of its step; what it wrote is anything."""
        chunks = self.scheduler.schedule()
        self.blocks.forget()
        for sequence, num_tokens in chunks:
            for slot in self._slots(sequence, sequence.num_computed, num_tokens):
                self.contents[slot] = "rubbish"
            self.scheduler.finish(self.live.pop(sequence.order))

    @rule()
    def step(self) -> None:
        chunks = self.scheduler.schedule()
        assert bool(chunks) == bool(self.live), "work waits, yet nothing runs"
        assert sum(chunk.num_tokens for chunk in chunks) <= self.scheduler.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.scheduler.config.max_num_seqs
        scheduled = {chunk.sequence.order for chunk in chunks}
        assert len(scheduled) == len(chunks)
        for sequence in self.scheduler.running:
            decoding = sequence.num_generated > 0 and sequence.num_uncomputed == 1
            assert not decoding or sequence.order in scheduled, "a decode stalls"
        self._run(chunks)
        self.scheduler.computed(chunks)
        for sequence, _ in chunks:
            if sequence.num_uncomputed == 0:
                sequence.append(sequence.num_tokens % 2)
                if sequence.is_full:
                    self.scheduler.finish(self.live.pop(sequence.order))

    def _run(self, chunks: list[Chunk]) -> None:
        """As a runner does: several tokens a sequence write first, single ones write and read by turns."""
        written: set[tuple[int, int]] = set()
        passes = [("write",), ("read",)] if any(n > 1 for _, n in chunks) else [("write", "read")]
        for work in passes:
            for sequence, num_tokens in reversed(chunks):
                assert num_tokens >= 1
                end = sequence.num_computed + num_tokens
                assert self.blocks.blocks_for(end) <= sequence.num_blocks
                if "write" in work:
                    for position, slot in enumerate(
                        self._slots(sequence, sequence.num_computed, num_tokens), sequence.num_computed
                    ):
                        assert slot not in written, "two tokens of a step share a slot"
                        written.add(slot)
                        self.contents[slot] = self._text(sequence, position)
                if "read" in work:
                    self._check_contents(sequence, end)

    def _check_contents(self, sequence: Sequence, count: int) -> None:
        held = [self.contents.get(slot) for slot in self._slots(sequence, 0, count)]
        assert held == [self._text(sequence, position) for position in range(count)]

    def _slots(self, sequence: Sequence, first: int, count: int) -> list[tuple[int, int]]:
        size = self.blocks.block_size
        return [(int(sequence.block_table[p // size]), p % size) for p in range(first, first + count)]

    def _text(self, sequence: Sequence, position: int) -> object:
        return sequence.salt, sequence.tokens[: position + 1].tobytes()

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "scheduler"):
            self.blocks.check_integrity(self.live.values())
            assert self.blocks.caching or self.blocks.num_cached == 0
            for queue in (self.scheduler.waiting, self.scheduler.running):
                orders = [sequence.order for sequence in queue]
                assert orders == sorted(orders)
            assert {s.order for s in self.scheduler.waiting + self.scheduler.running} == self.live.keys()
            assert all(s.num_blocks == 0 for s in self.scheduler.waiting)
            for sequence in self.live.values():
                self._check_contents(sequence, sequence.num_computed)

    def teardown(self) -> None:
        """Left alone, everything ends: each step brings the oldest forward."""
        if not hasattr(self, "scheduler"):
            return
        while self.live:
            oldest = self.live[min(self.live)]
            before = oldest.num_tokens + oldest.num_computed
            self.step()
            ended = oldest.order not in self.live
            assert ended or oldest.num_tokens + oldest.num_computed > before, "the oldest starves"
        assert self.blocks.num_free == self.blocks.num_blocks


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def test_check_integrity_finds_a_leak() -> None:
    blocks = BlockManager(4, 2)
    sequence = make_sequence((0, 0), 3, 2, 2)
    assert blocks.grow(sequence)
    blocks.check_integrity([sequence])
    with pytest.raises(EngineError, match="reference counts"):
        blocks.check_integrity([])
    with pytest.raises(EngineError, match="reference counts"):
        blocks.check_integrity([sequence, sequence])
    blocks._free.pop()
    with pytest.raises(EngineError, match=r"1 free \+ 0 cached \+ 2 used != 4 blocks"):
        blocks.check_integrity([sequence])


def test_grow_takes_all_or_nothing() -> None:
    blocks = BlockManager(3, 2)
    small, large = make_sequence((0, 0), 3, 1, 2), make_sequence((1, 0), 4, 1, 2)
    assert blocks.grow(small)
    assert not blocks.grow(large)
    assert (large.num_blocks, blocks.num_free) == (0, 1)


def test_decodes_come_before_prompts_and_prompts_fill_the_budget() -> None:
    scheduler = Scheduler(BlockManager(64, 4), SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=10))
    first, second, third = (make_sequence((i, 0), n, 8, 4) for i, n in enumerate((4, 13, 5)))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    expected = [
        [(first, 4), (second, 6)],
        [(first, 1), (second, 7), (third, 2)],
        [(first, 1), (second, 1), (third, 3)],
        [(first, 1), (second, 1), (third, 1)],
    ]
    for chunks in expected:
        scheduled = scheduler.schedule()
        assert [(c.sequence.order, c.num_tokens) for c in scheduled] == [(s.order, n) for s, n in chunks]
        for chunk in scheduled:
            last = chunk.is_last
            chunk.sequence.num_computed += chunk.num_tokens
            if last:
                chunk.sequence.append(1)


def test_the_newest_gives_way_and_comes_back_first() -> None:
    scheduler = Scheduler(BlockManager(4, 2), SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=16))
    old, new, last = (make_sequence((i, 0), n, 4, 2) for i, n in enumerate((2, 3, 1)))
    scheduler.add(old)
    scheduler.add(new)
    assert [c.sequence for c in scheduler.schedule()] == [old, new]
    for sequence in (old, new):
        sequence.num_computed = sequence.num_tokens
        sequence.append(1)
    scheduler.add(last)
    for _ in range(2):  # old needs its second block, then its third; new has two and needs a third
        for chunk in scheduler.schedule():
            chunk.sequence.num_computed += chunk.num_tokens
            chunk.sequence.append(1)
    assert scheduler.num_preemptions == 1
    assert [s.order for s in scheduler.running] == [(0, 0)]
    assert [s.order for s in scheduler.waiting] == [(1, 0), (2, 0)]


def compute(scheduler: Scheduler) -> list[Chunk]:
    """A step whose sequences that are computed whole get a token each."""
    chunks = scheduler.schedule()
    scheduler.computed(chunks)
    for sequence, _ in chunks:
        if sequence.num_uncomputed == 0:
            sequence.append(1)
    return chunks


def cached_scheduler(num_blocks: int = 16, **options: Any) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, 4, **options), SchedulerConfig(max_num_batched_tokens=64))


def test_a_prompt_finds_what_an_ended_one_left() -> None:
    scheduler = cached_scheduler()
    first = make_sequence((0, 0), 10, 8, 4)
    scheduler.add(first)
    for _ in range(4):  # 10 of the prompt and 3 of the output: three full blocks
        compute(scheduler)
    scheduler.finish(first)
    assert (scheduler.blocks.num_cached, scheduler.blocks.num_free) == (3, 16)
    again = Sequence((1, 0), first.tokens.copy(), 1, 4)
    scheduler.add(again)
    (chunk,) = scheduler.schedule()
    assert (again.num_cached, chunk.num_tokens) == (12, 2)
    assert (scheduler.blocks.num_queried_tokens, scheduler.blocks.num_hit_tokens) == (10 + 14, 12)


def test_the_last_token_of_a_prompt_is_computed_though_it_is_cached() -> None:
    scheduler = cached_scheduler()
    for number in range(2):
        sequence = Sequence((number, 0), np.arange(8, dtype=np.int32), 4, 3)
        scheduler.add(sequence)
        compute(scheduler)
    assert sequence.num_cached == 4
    # What both have computed is held once; the first has begun a third block.
    assert sequence.block_table[:2].tolist() == scheduler.running[0].block_table[:2].tolist()
    assert scheduler.blocks.num_free == 16 - 3


@pytest.mark.parametrize("salts", [("a", "b"), (None, "a")])
def test_salts_share_nothing(salts: tuple[str | None, str | None]) -> None:
    scheduler = cached_scheduler()
    for number, salt in enumerate(salts):
        sequence = Sequence((number, 0), np.arange(9, dtype=np.int32), 4, 4, salt=salt)
        scheduler.add(sequence)
        compute(scheduler)
        assert sequence.num_cached == 0


def test_the_same_tokens_after_another_beginning_are_another_block() -> None:
    scheduler = cached_scheduler()
    for number, tokens in enumerate(([1, 1, 1, 1, 5, 5, 5, 5, 0], [2, 2, 2, 2, 5, 5, 5, 5, 0])):
        sequence = Sequence((number, 0), np.array(tokens, np.int32), 4, 4)
        scheduler.add(sequence)
        compute(scheduler)
    assert sequence.num_cached == 0


def test_the_longest_unused_goes_first_and_its_end_before_its_beginning() -> None:
    scheduler = cached_scheduler(num_blocks=6)
    old, new = (make_sequence((number, 0), 9, 1, 4) for number in (0, 1))
    for sequence in (old, new):
        scheduler.add(sequence)
        compute(scheduler)
        scheduler.finish(sequence)
    large = make_sequence((2, 0), 12, 1, 4)  # two free blocks, and a cached one
    scheduler.add(large)
    compute(scheduler)
    scheduler.finish(large)
    assert [len(scheduler.blocks._find(sequence)) for sequence in (old, new)] == [1, 2]


def test_without_caching_only_running_sequences_share() -> None:
    scheduler = cached_scheduler(caching=False)
    for copies in (3, 1):
        sequences = [Sequence((copies, i), np.arange(9, dtype=np.int32), 4, 4) for i in range(copies)]
        for sequence in sequences:
            scheduler.add(sequence)
        compute(scheduler)
        assert [s.num_cached for s in sequences] == [0, 8, 8][:copies]
        for sequence in sequences:
            scheduler.finish(sequence)
        assert (scheduler.blocks.num_cached, scheduler.blocks.num_free) == (0, 16)


def test_a_step_of_single_tokens_reads_nothing_that_it_writes() -> None:
    """Each of them reads as soon as it has written; a step with longer chunks writes everything first."""
    scheduler = cached_scheduler()
    writer = Sequence((0, 0), np.arange(4, dtype=np.int32), 4, 2)
    scheduler.config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=3)
    scheduler.add(writer)
    compute(scheduler)
    reader = Sequence((1, 0), np.arange(5, dtype=np.int32), 4, 3)
    scheduler.add(reader)
    assert [chunk.num_tokens for chunk in compute(scheduler)] == [1, 2]
    assert reader.num_cached == 0

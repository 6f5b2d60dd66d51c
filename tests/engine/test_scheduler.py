"""The block manager and the scheduler under random arrivals, aborts and pressure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm_boost.engine.block_manager import BlockManager
from llm_boost.engine.scheduler import Scheduler
from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.engine.sequence import Sequence
from llm_boost.errors import EngineError


def make_sequence(order: tuple[int, int], prompt: int, output: int, block_size: int) -> Sequence:
    return Sequence(order, np.arange(prompt, dtype=np.int32), output, -(-(prompt + output) // block_size))


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.integers(1, 5),
        budget=st.integers(1, 20),
        data=st.data(),
    )
    def start(self, num_blocks: int, block_size: int, budget: int, data: st.DataObject) -> None:
        self.capacity = num_blocks * block_size
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(
            self.blocks,
            SchedulerConfig(max_num_seqs=data.draw(st.integers(1, budget)), max_num_batched_tokens=budget),
        )
        self.live: dict[tuple[int, int], Sequence] = {}
        self.number = 0

    @precondition(lambda self: self.capacity >= 2)
    @rule(data=st.data(), copies=st.sampled_from([1, 1, 1, 2, 5]))
    def arrive(self, data: st.DataObject, copies: int) -> None:
        prompt = data.draw(st.integers(1, self.capacity - 1))
        output = data.draw(st.integers(1, self.capacity - prompt))
        for index in range(copies):
            sequence = make_sequence((self.number, index), prompt, output, self.blocks.block_size)
            self.live[sequence.order] = sequence
            self.scheduler.add(sequence)
        self.number += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.finish(self.live.pop(data.draw(st.sampled_from(sorted(self.live)))))

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
        # Whoever reads a block that others hold too must not write it.
        holders: dict[int, int] = {}
        for sequence in self.live.values():
            for block in sequence.block_table.tolist():
                holders[block] = holders.get(block, 0) + 1
        for sequence, num_tokens in chunks:
            assert num_tokens >= 1
            assert sequence.num_blocks >= self.blocks.blocks_for(sequence.num_computed + num_tokens)
            written = sequence.block_table[sequence.num_computed // self.blocks.block_size :].tolist()
            assert all(holders[block] == 1 for block in written)
        for chunk in chunks:
            last = chunk.is_last
            chunk.sequence.num_computed += chunk.num_tokens
            if last:
                chunk.sequence.append(7)
                if chunk.sequence.is_full:
                    self.scheduler.finish(self.live.pop(chunk.sequence.order))

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "scheduler"):
            self.blocks.check_integrity(self.live.values())
            for queue in (self.scheduler.waiting, self.scheduler.running):
                orders = [sequence.order for sequence in queue]
                assert orders == sorted(orders)
            assert {s.order for s in self.scheduler.waiting + self.scheduler.running} == self.live.keys()
            assert all(s.num_blocks == 0 for s in self.scheduler.waiting)

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
    with pytest.raises(EngineError, match="1 free \\+ 2 held != 4 blocks"):
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

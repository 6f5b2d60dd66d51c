"""The block manager and the scheduler under random arrivals, aborts and pressure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm_boost.engine.block_manager import BlockManager
from llm_boost.engine.policies import RANKS
from llm_boost.engine.scheduler import Chunk, Scheduler
from llm_boost.engine.scheduler_config import SchedulerConfig, TemplateType
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
        template=st.sampled_from(["Mix", "Standard"]),
        data=st.data(),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        budget: int,
        caching: bool,
        template: TemplateType,
        data: st.DataObject,
    ) -> None:
        self.capacity = num_blocks * block_size
        self.blocks = BlockManager(num_blocks, block_size, caching=caching)
        seqs = data.draw(st.integers(1, budget))
        self.config = SchedulerConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            template_type=template,
            max_prefill_batch_size=data.draw(st.sampled_from([0, 1, seqs])),
            max_prefill_tokens=data.draw(st.sampled_from([None, 1, 7])),
            max_first_token_wait_time=500,
            max_preempt_count=data.draw(st.integers(0, min(seqs, 2))),
            support_select_batch=data.draw(st.booleans()),
            max_queue_delay_microseconds=1_000_000,
            prefill_policy_type=data.draw(st.sampled_from([0, 2])),
            decode_policy_type=data.draw(st.sampled_from([0, 2])),
        )
        self.scheduler = Scheduler(self.blocks, self.config)
        self.now = 0.0
        self.live: dict[tuple[int, int], Sequence] = {}
        self.contents: dict[tuple[int, int], object] = {}  # of each slot (block, offset): the text up to it
        self.number = 0

    @precondition(lambda self: self.capacity >= 2)
    @rule(
        data=st.data(),
        copies=st.sampled_from([1, 1, 1, 2, 5]),
        salt=st.sampled_from("aaab"),
        priority=st.integers(-1, 1),
    )
    def arrive(self, data: st.DataObject, copies: int, salt: str, priority: int) -> None:
        prompt = data.draw(st.integers(1, self.capacity - 1))
        output = data.draw(st.integers(1, self.capacity - prompt))
        differs = data.draw(st.integers(0, prompt))  # from here on
        tokens = np.array([0] * differs + [1] * (prompt - differs), np.int32)
        for index in range(copies):
            max_blocks = self.blocks.blocks_for(prompt + output)
            sequence = Sequence(
                (self.number, index),
                tokens,
                output,
                max_blocks,
                arrival=self.now,
                priority=priority,
                salt=salt,
            )
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
        chunks = self.schedule()
        self.blocks.forget()
        for sequence, num_tokens in chunks:
            for slot in self._slots(sequence, sequence.num_computed, num_tokens):
                self.contents[slot] = "rubbish"
            self.scheduler.finish(self.live.pop(sequence.order))

    @rule(seconds=st.sampled_from([0.0, 0.3, 2.0]))
    def step(self, seconds: float = 0.3) -> None:
        self.now += seconds
        chunks = self.schedule()
        self._run(chunks)
        self.scheduler.computed(chunks)
        for sequence, _ in chunks:
            if sequence.num_uncomputed == 0:
                sequence.append(sequence.num_tokens % 2)
                if sequence.is_full:
                    self.scheduler.finish(self.live.pop(sequence.order))

    def schedule(self) -> list[Chunk]:
        """The step's chunks, which keep every limit."""
        first = self.scheduler.running[0] if self.scheduler.running else None
        decoding = {s.order for s in self.scheduler.running if s.is_decoding}
        chunks = self.scheduler.schedule(self.now)
        running, config = self.scheduler.running, self.config
        assert bool(chunks) == bool(self.live), "work waits, yet nothing runs"
        assert sum(chunk.num_tokens for chunk in chunks) <= config.max_num_batched_tokens
        assert len(running) <= config.max_num_seqs
        assert first is None or first in running, "the first of those that run lost its place"
        scheduled = {chunk.sequence.order for chunk in chunks}
        assert len(scheduled) == len(chunks)
        prompts = [chunk for chunk in chunks if not chunk.sequence.is_decoding]
        decodes = {s.order for s in running if s.num_generated and s.is_decoding}
        assert len(prompts) <= config.prefill_batch_size + config.max_preempt_count
        if config.template_type == "Mix":
            assert decodes <= scheduled, "a decode stalls"
            limit = config.max_prefill_tokens or config.max_num_batched_tokens
            assert sum(chunk.num_tokens for chunk in prompts) <= limit
        elif prompts:
            assert not decoding & scheduled, "prompts and decodes in one step"
        assert sum(s.set_aside for s in self.scheduler.waiting) <= config.max_preempt_count + len(running)
        return chunks

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
            for queue, policy in (
                (self.scheduler.waiting, self.config.prefill_policy_type),
                (self.scheduler.running, self.config.decode_policy_type),
            ):
                ranks = [RANKS[policy](sequence) for sequence in queue]
                assert ranks == sorted(ranks)
            assert {s.order for s in self.scheduler.waiting + self.scheduler.running} == self.live.keys()
            assert all(s.num_blocks == 0 for s in self.scheduler.waiting)
            for sequence in self.live.values():
                self._check_contents(sequence, sequence.num_computed)

    def teardown(self) -> None:
        """Left alone, everything ends."""
        if not hasattr(self, "scheduler"):
            return
        most = 10 + sum(len(s._tokens) for s in self.live.values()) * (1 + len(self.live))
        for _ in range(most):
            self.step()
            if not self.live:
                break
        assert not self.live, "some starve"
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
        scheduled = scheduler.schedule(0.0)
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
    assert [c.sequence for c in scheduler.schedule(0.0)] == [old, new]
    for sequence in (old, new):
        sequence.num_computed = sequence.num_tokens
        sequence.append(1)
    scheduler.add(last)
    for _ in range(2):  # old needs its second block, then its third; new has two and needs a third
        for chunk in scheduler.schedule(0.0):
            chunk.sequence.num_computed += chunk.num_tokens
            chunk.sequence.append(1)
    assert scheduler.num_preemptions == 1
    assert [s.order for s in scheduler.running] == [(0, 0)]
    assert [s.order for s in scheduler.waiting] == [(1, 0), (2, 0)]


def compute(scheduler: Scheduler, now: float = 0.0) -> list[Chunk]:
    """A step whose sequences that are computed whole get a token each."""
    chunks = scheduler.schedule(now)
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
    (chunk,) = scheduler.schedule(0.0)
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


def scheduled(scheduler: Scheduler, now: float = 0.0) -> list[tuple[int, int]]:
    """A step's (request, tokens)."""
    return [(chunk.sequence.order[0], chunk.num_tokens) for chunk in compute(scheduler, now)]


def standard(num_blocks: int = 64, **settings: Any) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, 4), SchedulerConfig(template_type="Standard", **settings))


def arriving(number: int, prompt: int, arrival: float = 0.0, priority: int = 0, output: int = 20) -> Sequence:
    tokens = np.arange(prompt, dtype=np.int32) + 1000 * number
    blocks = -(-(prompt + output) // 4)
    return Sequence((number, 0), tokens, output, blocks, arrival=arrival, priority=priority)


def test_standard_computes_a_batch_of_whole_prompts_or_decodes() -> None:
    scheduler = standard(max_num_seqs=8, max_num_batched_tokens=10, max_prefill_batch_size=2)
    for number, prompt in enumerate((7, 9, 3)):
        scheduler.add(arriving(number, prompt))
    assert scheduled(scheduler) == [(0, 7), (1, 3)]
    assert scheduled(scheduler) == [(1, 6)], "the batch is computed before anything decodes"
    # The third has not waited: two of eight decode until it is due.
    assert scheduled(scheduler, 0.004) == [(0, 1), (1, 1)]
    assert scheduled(scheduler, 0.006) == [(2, 3)]
    assert scheduled(scheduler, 0.006) == [(0, 1), (1, 1), (2, 1)]


def test_standard_closes_a_batch_at_its_tokens() -> None:
    scheduler = standard(max_prefill_tokens=10)
    for number, prompt in enumerate((12, 6, 4, 1)):
        scheduler.add(arriving(number, prompt))
    assert scheduled(scheduler) == [(0, 12)], "a long prompt is a batch of its own"
    assert scheduled(scheduler, 1.0) == [(1, 6), (2, 4)]
    assert scheduled(scheduler, 1.0) == [(3, 1)]


def test_a_full_batch_of_prompts_does_not_wait() -> None:
    scheduler = standard(max_prefill_batch_size=2)
    scheduler.add(arriving(0, 3))
    assert scheduled(scheduler) == [(0, 3)], "nothing runs: nothing to wait for"
    scheduler.add(arriving(1, 3))
    assert scheduled(scheduler) == [(0, 1)]
    scheduler.add(arriving(2, 3))
    assert scheduled(scheduler) == [(1, 3), (2, 3)]


def test_standard_decodes_when_no_prompt_finds_room() -> None:
    scheduler = standard(num_blocks=3)
    scheduler.add(arriving(0, 7, output=5))
    scheduler.add(arriving(1, 8, output=4))
    assert scheduled(scheduler) == [(0, 7)]
    assert scheduled(scheduler, 9.0) == [(0, 1)]


def test_select_batch_weighs_what_waits_against_empty_places() -> None:
    """Three run, one place of four is empty: 150 ms x 3 against 100 ms a step that it stays empty."""
    scheduler = standard(
        max_num_seqs=4, support_select_batch=True, prefill_time_ms_per_req=150, decode_time_ms_per_req=100
    )
    for number in range(3):
        scheduler.add(arriving(number, 2))
    assert len(scheduled(scheduler)) == 3
    scheduler.add(arriving(3, 2))
    lengths = [len(scheduled(scheduler, 1.0)) for _ in range(5)]
    assert lengths == [3, 3, 3, 3, 1]


def test_mix_bounds_the_prompts_of_a_step() -> None:
    config = SchedulerConfig(max_num_batched_tokens=64, max_prefill_batch_size=2, max_prefill_tokens=5)
    scheduler = Scheduler(BlockManager(64, 4), config)
    for number in range(3):
        scheduler.add(arriving(number, 4))
    assert scheduled(scheduler) == [(0, 4), (1, 1)]
    assert scheduled(scheduler) == [(0, 1), (1, 3), (2, 2)]
    assert scheduled(scheduler) == [(0, 1), (1, 1), (2, 2)]


def test_one_that_has_waited_too_long_is_let_in_once() -> None:
    """Blocks for two; the newer one that runs is set aside, and comes back before it could be again."""
    config = SchedulerConfig(max_preempt_count=1, max_first_token_wait_time=1000)
    scheduler = Scheduler(BlockManager(8, 4), config)
    for number in (0, 1):
        scheduler.add(arriving(number, 11, output=5))
    assert scheduled(scheduler) == [(0, 11), (1, 11)]
    scheduler.add(arriving(2, 11, arrival=0.5, output=5))
    assert scheduled(scheduler, 1.4) == [(0, 1), (1, 1)]
    assert scheduled(scheduler, 1.5) == [(0, 1), (2, 11)]
    aside = scheduler.waiting[0]
    assert (aside.order[0], aside.set_aside, scheduler.num_preemptions) == (1, True, 1)
    scheduler.add(arriving(3, 4, arrival=0.0, output=2))
    assert scheduled(scheduler, 9.0) == [(0, 1), (2, 1)], "nobody else is set aside meanwhile"
    for sequence in scheduler.running[:]:
        scheduler.finish(sequence)
    (first, tokens), _ = scheduled(scheduler, 9.0)
    assert first == 1
    assert tokens < 13, "what its blocks still hold is not computed again"


def test_nobody_is_set_aside_unless_allowed() -> None:
    scheduler = Scheduler(BlockManager(8, 4), SchedulerConfig(max_first_token_wait_time=0))
    for number in range(3):
        scheduler.add(arriving(number, 11, output=3))
    for _ in range(2):
        assert [number for number, _ in scheduled(scheduler, 9.0)] == [0, 1]


@pytest.mark.parametrize(("policy", "order"), [(0, [0, 1, 2]), (2, [2, 0, 1])])
def test_policies_say_who_is_first(policy: int, order: list[int]) -> None:
    waits = Scheduler(BlockManager(64, 4), SchedulerConfig(prefill_policy_type=policy))
    runs = Scheduler(BlockManager(64, 4), SchedulerConfig(decode_policy_type=policy, prefill_policy_type=0))
    for number, priority in enumerate((0, 1, -1)):
        for scheduler in (waits, runs):
            scheduler.add(arriving(number, 3, arrival=number, priority=priority))
    assert [sequence.order[0] for sequence in waits.waiting] == order
    scheduled(runs)
    assert [sequence.order[0] for sequence in runs.running] == order

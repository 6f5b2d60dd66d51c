"""Guessing ahead changes no token: every text is what it is without, and costs less where it repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Sequences
from typing import Any

import numpy as np
import pytest
from engine_fakes import FakeRunner, FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_boost.engine.batch import Batch, FloatArray
from llm_boost.engine.draft_model import DraftModel
from llm_boost.engine.drafts import Drafting, Speculator, StepTimes, _Guess
from llm_boost.engine.engine import Engine
from llm_boost.engine.outputs import RequestOutput
from llm_boost.engine.prompt_lookup import PromptLookup
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.engine.sequence import Sequence


class Oracle:
    """Knows what the model says, and errs as often as it is told to."""

    seconds = 0.0

    def __init__(self, runner: FakeRunner, errors: float, seed: int = 0) -> None:
        self._runner = runner
        self._errors = errors
        self._random = np.random.default_rng(seed)

    def follow(self, sequences: Sequences[Sequence]) -> None:
        for sequence in sequences:
            sequence.drafting = sequence.drafting or Drafting()
            sequence.drafting.available = True

    def propose(self, wanted: Sequences[tuple[Sequence, int]]) -> None:
        for sequence, count in wanted:
            drafts = np.array(self._runner.greedy(sequence.tokens.tolist(), count), np.int32)
            wrong = self._random.random(count) < self._errors
            sequence.propose(np.where(wrong, self._random.integers(2, 127, count), drafts).astype(np.int32))


def run(jobs: list[tuple[list[int], SamplingParams]], speculator: Speculator | None, **options: Any) -> Any:
    runner = options.pop("runner", None) or FakeRunner(num_blocks=options.pop("num_blocks", 64))
    engine = Engine(runner, FakeTokenizer(), {1}, SchedulerConfig(**options), speculator=speculator)
    ids = [engine.add({"prompt_token_ids": prompt}, params) for prompt, params in jobs]
    finished: dict[str, RequestOutput] = {}
    for _ in range(5000):
        if not engine.has_work:
            break
        for output in engine.step():
            assert output.request_id not in finished
            if output.finished:
                finished[output.request_id] = output
        engine.blocks.check_integrity(engine.scheduler.running)
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return [finished[request_id] for request_id in ids], engine


def told(outputs: list[RequestOutput]) -> Any:
    return [
        (
            o.prompt_logprobs,
            [(c.token_ids, c.text, c.finish_reason, c.stop_reason, c.logprobs) for c in o.outputs],
        )
        for o in outputs
    ]


class Always(Speculator):
    """Takes all the drafts there are, whatever they cost."""

    def _best(self, guesses: Sequences[Any], num_sequences: int) -> int:
        return len(guesses)


jobs = st.lists(
    st.tuples(
        st.lists(st.integers(2, 20), min_size=1, max_size=30),
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0, 0, 0.3, 1.0]),
            seed=st.integers(0, 1000),
            max_tokens=st.integers(1, 25),
            n=st.sampled_from([1, 1, 3]),
            repetition_penalty=st.sampled_from([1.0, 1.3]),
            presence_penalty=st.sampled_from([0.0, 0.5]),
            frequency_penalty=st.sampled_from([0.0, 0.5]),
            min_tokens=st.sampled_from([0, 0, 1]),
            stop=st.sampled_from([None, "a", ["k", "Z"]]),
            logprobs=st.sampled_from([None, 2]),
            prompt_logprobs=st.sampled_from([None, None, 1]),
            ignore_eos=st.booleans(),
        ),
    ),
    min_size=1,
    max_size=5,
)


@given(jobs, st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 6), st.integers(15, 60), st.integers(4, 24))
@settings(max_examples=60, deadline=None)
def test_drafts_change_nothing(
    asked: list[tuple[list[int], SamplingParams]], errors: float, most: int, num_blocks: int, budget: int
) -> None:
    """Neither tokens nor text, logprobs, stops or lengths; with penalties, and when memory is short."""
    expected, _ = run(asked, None, num_blocks=400)
    runner = FakeRunner(num_blocks=num_blocks)
    speculator = Always(Oracle(runner, errors), most)
    outputs, _ = run(
        asked, speculator, runner=runner, max_num_seqs=min(4, budget), max_num_batched_tokens=budget
    )
    assert told(outputs) == told(expected)


@given(jobs, st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_prompt_lookup_changes_nothing(
    asked: list[tuple[list[int], SamplingParams]], most: int, low: int
) -> None:
    expected, _ = run(asked, None)
    outputs, _ = run(asked, Always(PromptLookup(low, 4), most))
    assert told(outputs) == told(expected)


def test_right_drafts_save_steps() -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    _, plain = run([([5, 6], params)], None)
    runner = FakeRunner()
    _, quick = run([([5, 6], params)], Always(Oracle(runner, 0.0), 5), runner=runner)
    assert plain.stats().num_steps == 24
    assert quick.stats().num_steps == 1 + 4  # the prompt's, then six tokens a step, the last 23 of them
    assert quick.stats().num_accepted_tokens == quick.stats().num_drafted_tokens == 19


def test_those_that_wait_for_room_do_not_stop_guesses() -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    runner = FakeRunner()
    jobs = [([5, 6], params), ([7, 8], params)]
    _, engine = run(jobs, Always(Oracle(runner, 0.0), 5), runner=runner, max_num_seqs=1)
    assert engine.stats().num_steps == 2 * (1 + 4)


class Echo(FakeRunner):
    """Says what it said two tokens before."""

    def logits_after(self, tokens: list[int]) -> FloatArray:
        logits = np.zeros(self.vocab_size, np.float32)
        logits[tokens[-2]] = 9
        return logits


def test_a_grammar_is_never_guessed_ahead() -> None:
    engine = Engine(Echo(), FakeTokenizer(), {1}, speculator=Always(PromptLookup(1, 4), 4))
    engine.add({"prompt_token_ids": [5, 6, 5, 6]}, SamplingParams(temperature=0, max_tokens=8))
    engine.step()
    (completion,) = next(iter(engine._requests.values())).completions
    completion.grammar = object()  # type: ignore[assignment]
    engine._speculate()
    assert completion.sequence.num_drafts == 0
    completion.grammar = None
    engine._speculate()
    assert completion.sequence.num_drafts == 4


class Dice(FakeRunner):
    """The next token has probabilities that depend on the last alone."""

    def logits_after(self, tokens: list[int]) -> FloatArray:
        logits = np.full(self.vocab_size, -np.inf, np.float32)
        logits[2:6] = np.log([0.4, 0.3, 0.2, 0.1] if tokens[-1] % 2 else [0.1, 0.2, 0.3, 0.4])
        return np.where(np.isfinite(logits), logits, np.float32(-60))


def test_the_distribution_is_the_models() -> None:
    """Pairs of neighbours over many seeds, by a chi-square test at 0.1 %, with drafts that are half wrong."""
    runner = Dice(num_blocks=4000, max_model_len=64)
    jobs = [([7, 2], SamplingParams(seed=seed, max_tokens=40, ignore_eos=True)) for seed in range(120)]
    outputs, engine = run(
        jobs, Always(PromptLookup(1, 2), 4), runner=runner, max_num_seqs=128, max_num_batched_tokens=1024
    )
    stats = engine.stats()
    assert 0.1 < stats.num_accepted_tokens / stats.num_drafted_tokens < 0.6
    pairs = Counter(
        pair
        for output in outputs
        for pair in zip(output.outputs[0].token_ids, output.outputs[0].token_ids[1:], strict=False)
    )
    for first in range(2, 6):
        seen = np.array([pairs[first, second] for second in range(2, 6)], float)
        share = np.array([0.4, 0.3, 0.2, 0.1] if first % 2 else [0.1, 0.2, 0.3, 0.4])
        expected = seen.sum() * share
        assert seen.sum() > 500
        assert ((seen - expected) ** 2 / expected).sum() < 16.27  # three degrees of freedom


def lookup(tokens: list[int], low: int = 2, high: int = 4, count: int = 3) -> list[int]:
    sequence = Sequence((0, 0), np.array(tokens, np.int32), 50, 100)
    drafter = PromptLookup(low, high)
    drafter.follow([sequence])
    assert sequence.drafting is not None
    if not sequence.drafting.available:
        return []
    drafter.propose([(sequence, count)])
    return sequence.with_drafts(sequence.num_drafts)[len(tokens) :].tolist()


@pytest.mark.parametrize(
    ("tokens", "drafts"),
    [
        ([1, 2, 3, 9, 1, 2], [3, 9, 1]),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # the latest place
        ([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2], [3, 6, 1]),  # the longest ending before the latest place
        ([1, 2, 1, 2], [1, 2, 1]),  # goes round
        ([7, 7, 7], [7, 7, 7]),
        ([1, 2, 3, 4], []),
        ([3, 1, 4, 1], []),  # one token alone is too few
        ([1], []),
    ],
)
def test_prompt_lookup_continues_what_stood_before(tokens: list[int], drafts: list[int]) -> None:
    assert lookup(tokens) == drafts


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 2))
def test_prompt_lookup_is_the_obvious_search(tokens: list[int], low: int, more: int) -> None:
    high = low + more
    expected: list[int] = []
    for length in range(min(high, len(tokens) - 1), low - 1, -1):
        ends = [e for e in range(length, len(tokens)) if tokens[e - length : e] == tokens[-length:]]
        if ends:
            expected = [*tokens[ends[-1] :]][:1]
            break
    assert lookup(tokens, low, high, 1) == expected


def test_a_step_is_filled_with_the_drafts_that_pay() -> None:
    """Ten milliseconds for up to four tokens, then two more for each."""
    speculator = Speculator(PromptLookup(1, 2), 8)
    for num_tokens in range(1, 20):
        for _ in range(3):
            speculator.times.measure(num_tokens, 0.010 + 0.002 * max(0, num_tokens - 4))

    def best(chances: list[float], num_sequences: int = 1) -> int:
        guesses = [_Guess(-chance, depth, 0) for depth, chance in enumerate(chances, 1)]
        return speculator._best(guesses, num_sequences)

    # Three are free, five give 378 tokens a second, and six 376.
    assert best([0.95, 0.90, 0.86, 0.81, 0.77, 0.73]) == 5
    assert best([0.3, 0.09, 0.03, 0.01]) == 3
    assert best([0.01, 0.01]) == 0, "too little to be worth an error of measurement"
    assert best([0.5, 0.4, 0.3], 16) == 0, "a full batch has no idle arithmetic"
    speculator._drafter.seconds = 0.004  # type: ignore[misc]
    assert best([0.95, 0.90, 0.86, 0.81, 0.77, 0.73]) == 3, "guesses that take time pay less"


def test_step_times_are_interpolated_and_tried_beyond() -> None:
    times = StepTimes()
    times.measure(2, 1.0)
    times.measure(4, 3.0)
    np.testing.assert_allclose(times.table(1, 6), [1 / 1.05, 1.0, 2.0, 3.0, 3.15, 3.3])
    for _ in range(300):
        times.measure(2, 1.0)
    for _ in range(300):
        times.measure(2, 1.0)
    np.testing.assert_allclose(times.table(2, 4), [1.0, 1.05, 1.1], err_msg="an old time is forgotten")


def test_rates_follow_what_happened() -> None:
    drafting = Drafting()
    assert drafting.chances(3) == []
    drafting.available = True
    for hit in [True] * 40:
        drafting.learn(hit)
    assert drafting.chances(2)[1] > 0.95
    for hit in [False] * 40:
        drafting.learn(hit)
    assert drafting.chances(1)[0] < 0.01


def test_a_runner_sees_each_row_that_is_verified() -> None:
    runner = FakeRunner()
    seen: list[Batch] = runner.batches
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    run([([5, 6], params), ([7, 8, 9], params)], Always(Oracle(runner, 0.0), 3), runner=runner)
    assert [len(batch.logit_rows) for batch in seen] == [2, 8, 8]
    assert seen[1].logit_rows.tolist() == list(range(8))


@given(jobs, st.integers(1, 6), st.sampled_from([10, 64]), st.integers(4, 24), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_draft_model_changes_nothing(
    asked: list[tuple[list[int], SamplingParams]], most: int, num_blocks: int, budget: int, same: bool
) -> None:
    """Whether it is the model itself or a coarser one; whether its own cache holds all, or too few."""
    expected, _ = run(asked, None)
    small = FakeRunner(num_blocks=num_blocks) if same else Coarse(num_blocks=num_blocks)
    drafter = DraftModel(small, 128, budget)
    outputs, _ = run(asked, Always(drafter, most), max_num_seqs=min(4, budget), max_num_batched_tokens=budget)
    assert told(outputs) == told(expected)
    drafter.blocks.check_integrity(drafter.mirrors.values())
    drafter.follow([])
    assert drafter.blocks.num_free == num_blocks
    assert all(len(batch.token_ids) <= max(budget, 2) * 4 for batch in small.batches)


class Coarse(FakeRunner):
    """Right half of the time."""

    def logits_after(self, tokens: list[int]) -> FloatArray:
        logits = super().logits_after(tokens)
        return logits if len(tokens) % 2 else np.roll(logits, 1)


def test_a_draft_model_that_is_right_saves_steps() -> None:
    drafter = DraftModel(FakeRunner(), 128, 512)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    _, engine = run([([5, 6], params)], Always(drafter, 5))
    assert engine.stats().num_steps == 1 + 4
    assert engine.stats().num_accepted_tokens == 19


def test_a_draft_model_that_is_wrong_is_tried_less_and_less() -> None:
    class Wrong(FakeRunner):
        def logits_after(self, tokens: list[int]) -> FloatArray:
            return np.roll(super().logits_after(tokens), 1)

    runner = FakeRunner(num_blocks=400, max_model_len=1000)
    small = Wrong(num_blocks=400, max_model_len=1000)
    speculator = Speculator(DraftModel(small, 128, 512), 4)
    speculator.times.measure = lambda num_tokens, seconds: None  # type: ignore[method-assign]
    for num_tokens in range(1, 6):
        StepTimes.measure(speculator.times, num_tokens, 1.0 + 0.1 * num_tokens)
    params = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
    _, engine = run([([5, 6], params)], speculator, runner=runner)
    assert engine.stats().num_accepted_tokens == 0
    assert 4 < engine.stats().num_drafted_tokens < 200


def test_a_draft_model_that_fails_is_done_without() -> None:
    small = FakeRunner()
    small.crash = True
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with pytest.warns(RuntimeWarning, match="speculation is off from now on: RuntimeError: the fake model"):
        (output,), _ = run([([5, 6], params)], Always(DraftModel(small, 128, 512), 5))
    assert output.outputs[0].token_ids == FakeRunner().greedy([5, 6], 24)

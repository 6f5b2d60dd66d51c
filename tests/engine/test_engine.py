"""The loop against a model that knows its answers: no batch, chunk or preemption may change a text."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from engine_fakes import FakeRunner, FakeStream, FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_boost.engine.engine import Engine
from llm_boost.engine.outputs import RequestOutput
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.errors import ConfigError, RequestError

Job = tuple[list[int], SamplingParams]


def make_engine(runner: FakeRunner | None = None, *, seed: int = 0, **scheduling: Any) -> Engine:
    return Engine(runner or FakeRunner(), FakeTokenizer(), {1}, SchedulerConfig(**scheduling), seed=seed)


def tokens(ids: list[int]) -> Any:
    return {"prompt_token_ids": ids}


def drain(engine: Engine) -> dict[str, RequestOutput]:
    """Steps until all is done; the finished outputs by request."""
    finished: dict[str, RequestOutput] = {}
    for _ in range(5000):
        if not engine.has_work:
            break
        for output in engine.step():
            if output.finished:
                assert output.request_id not in finished, "a second terminal event"
                finished[output.request_id] = output
        engine.blocks.check_integrity(engine.scheduler.running)
    assert not engine.has_work
    assert not engine.scheduler.has_work
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return finished


def alone(job: Job) -> list[tuple[list[int], str, str | None]]:
    engine = make_engine(FakeRunner(num_blocks=400), max_num_seqs=1)
    engine.add(tokens(job[0]), job[1])
    (output,) = drain(engine).values()
    assert engine.scheduler.num_preemptions == 0
    return told(output)


def told(output: RequestOutput) -> list[tuple[list[int], str, str | None]]:
    return [(c.token_ids, c.text, c.finish_reason) for c in output.outputs]


jobs = st.lists(
    st.tuples(
        st.lists(st.integers(2, 127), min_size=1, max_size=30),
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0, 0, 0.8]),
            seed=st.integers(0, 1000),
            max_tokens=st.integers(1, 25),
            n=st.sampled_from([1, 1, 1, 2, 4]),
            repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
            stop=st.sampled_from([None, "a", ["k", "Z"]]),
            ignore_eos=st.booleans(),
        ),
    ),
    min_size=1,
    max_size=8,
)


@given(
    jobs,
    st.integers(1, 24),
    st.integers(1, 6),
    st.integers(15, 60),
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_company_chunks_and_preemption_change_nothing(
    asked: list[Job], budget: int, seqs: int, num_blocks: int, pauses: list[int]
) -> None:
    engine = make_engine(
        FakeRunner(num_blocks=num_blocks), max_num_seqs=min(seqs, budget), max_num_batched_tokens=budget
    )
    finished: dict[str, RequestOutput] = {}
    ids = []
    for job, pause in zip(asked, pauses, strict=False):
        ids.append(engine.add(tokens(job[0]), job[1]))
        for _ in range(pause):
            finished |= {output.request_id: output for output in engine.step()}
    finished |= drain(engine)
    for request_id, job in zip(ids, asked, strict=True):
        assert told(finished[request_id]) == alone(job)


def test_preemption_happens_and_changes_nothing() -> None:
    runner = FakeRunner(num_blocks=16)
    engine = make_engine(runner, max_num_seqs=4)
    prompts = [[10 + i] * 12 for i in range(4)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    ids = [engine.add(tokens(prompt), params) for prompt in prompts]
    finished = drain(engine)
    assert engine.scheduler.num_preemptions > 0
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert finished[request_id].outputs[0].token_ids == runner.greedy(prompt, 20)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 30), st.sampled_from([1, 1, 3])),
        st.tuples(st.just("step"), st.integers(1, 5)),
        st.tuples(st.just("abort"), st.integers(0, 10)),
        st.tuples(st.just("crash")),
    ),
    max_size=30,
)


@given(operations, st.sampled_from([3, 16]))
@settings(max_examples=60, deadline=None)
def test_every_request_ends_exactly_once(script: list[tuple[Any, ...]], budget: int) -> None:
    runner = FakeRunner(num_blocks=20)
    runner.poisoned_tokens = {50, 51}
    engine = make_engine(runner, max_num_seqs=3, max_num_batched_tokens=budget)
    events: list[RequestOutput] = []
    ids: list[str] = []
    for operation, *numbers in script:
        if operation == "add":
            length, max_tokens, n = numbers
            params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True)
            ids.append(engine.add(tokens([60] * length), params, stream=length % 2 == 0))
        elif operation == "step":
            for _ in range(numbers[0]):
                events += engine.step()
        elif operation == "abort" and ids:
            output = engine.abort(ids[numbers[0] % len(ids)])
            events += [output] if output else []
        elif operation == "crash":
            runner.crash = True
            events += engine.step()
            runner.crash = False
        engine.blocks.check_integrity(engine.scheduler.running)
    while engine.has_work:
        events += engine.step()
    ends = Counter(event.request_id for event in events if event.finished)
    assert ends == Counter(ids)
    last = {event.request_id: event for event in events}
    assert all(output.finished for output in last.values()), "an output after the end"
    for output in last.values():
        assert all(completion.finish_reason for completion in output.outputs)
        assert (output.error is not None) == any(c.finish_reason == "error" for c in output.outputs)
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_a_crash_leaves_nothing_to_be_found() -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    engine.add(tokens([9] * 20), params)
    drain(engine)
    engine.add(tokens([9] * 20), params)
    runner.crash = True
    (failed,) = engine.step()
    runner.crash = False
    assert failed.num_cached_tokens == 16
    again = engine.add(tokens([9] * 20), params)
    output = drain(engine)[again]
    assert output.num_cached_tokens == 0
    assert output.outputs[0].token_ids == runner.greedy([9] * 20, 4)


def test_prompts_of_different_salts_share_nothing() -> None:
    engine = make_engine()
    cached = []
    for salt in ("a", None, "b", "a"):
        prompt = tokens([9] * 20) | ({"cache_salt": salt} if salt else {})
        request_id = engine.add(prompt, SamplingParams(max_tokens=1))
        cached.append(drain(engine)[request_id].num_cached_tokens)
    assert cached == [0, 0, 0, 16]
    for salt in ("", 5):
        with pytest.raises(RequestError, match="cache_salt: got"):
            engine.add(tokens([9]) | {"cache_salt": salt}, SamplingParams())


def test_prompts_whose_positions_turn_differently_share_nothing() -> None:
    runner = FakeRunner()
    runner.position_salt = lambda num_prompt_tokens: max(num_prompt_tokens, 24)  # type: ignore[method-assign]
    engine = make_engine(runner)
    cached = []
    for length in (20, 24, 25, 26, 25):
        request_id = engine.add(tokens([9] * length), SamplingParams(max_tokens=1))
        cached.append(drain(engine)[request_id].num_cached_tokens)
    assert cached == [0, 20, 0, 0, 24]


def test_a_row_that_is_not_finite_fails_its_request_alone() -> None:
    runner = FakeRunner()
    runner.poisoned_tokens = {50}
    engine = make_engine(runner)
    good = engine.add(tokens([9, 8]), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    bad = engine.add(tokens([9, 50]), SamplingParams(temperature=0, max_tokens=6))
    finished = drain(engine)
    assert finished[good].outputs[0].token_ids == runner.greedy([9, 8], 6)
    assert finished[bad].outputs[0].finish_reason == "error"
    assert "NaN" in (finished[bad].error or "")


def test_a_model_that_crashes_fails_the_batch_and_not_the_engine() -> None:
    runner = FakeRunner()
    engine = make_engine(runner, max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    first, second = engine.add(tokens([5]), params), engine.add(tokens([6]), params)
    runner.crash = True
    (failed,) = engine.step()
    runner.crash = False
    assert (failed.request_id, failed.finished) == (first, True)
    assert failed.error == "the model failed: RuntimeError: the fake model crashed"
    assert drain(engine)[second].outputs[0].token_ids == runner.greedy([6], 5)


def test_a_detokeniser_that_fails_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    good = engine.add(tokens([9, 8]), SamplingParams(max_tokens=4, ignore_eos=True))
    bad = engine.add(tokens([9, 7]), SamplingParams(max_tokens=4, ignore_eos=True))

    def push(self: Any, token_id: int) -> str:
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "no such character")

    broken = type("Broken", (FakeStream,), {"push": push})(FakeTokenizer(), True)
    engine._requests[bad].completions[0].text._stream = broken
    finished = drain(engine)
    assert finished[good].outputs[0].finish_reason == "length"
    assert "detokenising failed: UnicodeDecodeError" in (finished[bad].error or "")


def test_completions_of_a_prompt_share_its_full_blocks() -> None:
    runner = FakeRunner(num_blocks=40, block_size=4)
    engine = make_engine(runner)
    prompt = list(range(2, 23))  # 21 tokens: five full blocks and one token
    request_id = engine.add(tokens(prompt), SamplingParams(n=4, seed=3, max_tokens=3, ignore_eos=True))
    engine.step()
    assert len(engine.scheduler.running) == 4
    assert engine.blocks.num_blocks - engine.blocks.num_free == 5 + 4
    assert len(runner.batches[0].token_ids) == 21 + 3, "the shared blocks were computed again"
    outputs = drain(engine)[request_id].outputs
    assert [c.index for c in outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in outputs}) > 1


def generate(params: SamplingParams, prompt: list[int] | None = None, **options: Any) -> Any:
    engine = make_engine(**options)
    request_id = engine.add(tokens(prompt or [20, 30, 40]), params)
    return drain(engine)[request_id].outputs[0]


def test_end_of_sequence_ends_the_text_and_is_not_in_it() -> None:
    bias = {1: 100.0}
    ended = generate(SamplingParams(logit_bias=bias, max_tokens=5))
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([1], "", "stop", None)
    ignored = generate(SamplingParams(logit_bias=bias, max_tokens=5, ignore_eos=True))
    assert (ignored.token_ids, ignored.finish_reason) == ([1] * 5, "length")
    shown = generate(
        SamplingParams(logit_bias=bias, include_stop_str_in_output=True, skip_special_tokens=False)
    )
    assert shown.text == "<1>"


def test_min_tokens_puts_the_end_off() -> None:
    output = generate(SamplingParams(logit_bias={1: 100.0}, min_tokens=4, max_tokens=10))
    assert len(output.token_ids) == 5
    assert output.token_ids[-1] == 1
    assert 1 not in output.token_ids[:-1]


def test_stop_token_ids_name_the_one_that_came() -> None:
    greedy = FakeRunner().greedy([20, 30, 40], 8)
    output = generate(SamplingParams(temperature=0, stop_token_ids=[greedy[3]], max_tokens=8))
    assert output.token_ids == greedy[: greedy.index(greedy[3]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", greedy[3])


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_across_tokens(include: bool) -> None:
    text = FakeTokenizer().decode(FakeRunner().greedy([20, 30, 40], 12))
    stop = text[4:7]
    engine = make_engine()
    engine.add(
        tokens([20, 30, 40]),
        SamplingParams(
            temperature=0, stop=[stop, "nowhere"], include_stop_str_in_output=include, max_tokens=12
        ),
        stream=True,
    )
    outputs = [output for _ in range(12) if engine.has_work for output in engine.step()]
    last = outputs[-1].outputs[0]
    end = text.index(stop)
    assert last.text == text[: end + len(stop) * include]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert len(last.token_ids) == end + len(stop)
    assert "".join(output.outputs[0].delta for output in outputs) == last.text
    assert all(last.text.startswith(output.outputs[0].text) for output in outputs)


def test_streaming_gives_each_token_and_others_only_their_end() -> None:
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    streamed = engine.add(tokens([3]), params, stream=True)
    quiet = engine.add(tokens([4]), params)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [len(o.outputs[0].token_ids) for o in outputs if o.request_id == streamed] == [1, 2, 3, 4, 5]
    assert [o.finished for o in outputs if o.request_id == streamed] == [False] * 4 + [True]
    assert [o.finished for o in outputs if o.request_id == quiet] == [True]


def test_a_seed_gives_the_same_text_in_any_company() -> None:
    params = SamplingParams(seed=42, max_tokens=10, ignore_eos=True)
    single = generate(params).token_ids
    engine = make_engine(max_num_batched_tokens=7, max_num_seqs=7)
    ids = [engine.add(tokens([i + 2] * i), SamplingParams()) for i in range(1, 9)]
    ids.append(engine.add(tokens([20, 30, 40]), params))
    assert drain(engine)[ids[-1]].outputs[0].token_ids == single
    assert generate(SamplingParams(seed=43, max_tokens=10, ignore_eos=True)).token_ids != single
    assert generate(SamplingParams(seed=-1, max_tokens=4)).finish_reason


def test_without_a_seed_requests_differ_and_engines_repeat() -> None:
    def run(seed: int) -> list[list[int]]:
        engine = make_engine(seed=seed)
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        ids = [engine.add(tokens([5]), params) for _ in range(3)]
        finished = drain(engine)
        return [finished[i].outputs[0].token_ids for i in ids]

    assert run(0) == run(0)
    assert run(0) != run(1)
    assert len({tuple(ids) for ids in run(0)}) == 3


def test_logprobs_are_of_the_chosen_and_the_likeliest() -> None:
    runner = FakeRunner()
    output = generate(SamplingParams(temperature=1.5, seed=1, logprobs=3, max_tokens=4, ignore_eos=True))
    history = [20, 30, 40]
    total = 0.0
    for token, logprobs in zip(output.token_ids, output.logprobs, strict=True):
        logits = runner.logits_after(history).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-logits).tolist()
        assert set(logprobs) == {token, *order[:3]}
        for candidate, logprob in logprobs.items():
            assert logprob.logprob == pytest.approx(expected[candidate], abs=1e-4)
            assert logprob.rank == order.index(candidate) + 1
            assert logprob.decoded_token == FakeTokenizer().decode([candidate], skip_special_tokens=False)
        total += expected[token]
        history.append(token)
    assert output.cumulative_logprob == pytest.approx(total, abs=1e-3)
    plain = generate(SamplingParams(temperature=1.5, seed=1, max_tokens=4, ignore_eos=True))
    assert (plain.logprobs, plain.cumulative_logprob) == (None, None)
    assert plain.token_ids == output.token_ids
    own = generate(SamplingParams(logprobs=0, max_tokens=2, ignore_eos=True))
    assert [list(logprobs) for logprobs in own.logprobs] == [[token] for token in own.token_ids]


def test_abort_tells_what_there_was() -> None:
    engine = make_engine(max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    running, waiting = engine.add(tokens([5]), params), engine.add(tokens([6]), params)
    for _ in range(3):
        engine.step()
    for request_id, count in ((running, 3), (waiting, 0)):
        output = engine.abort(request_id)
        assert output
        assert output.finished
        assert output.outputs[0].finish_reason == "abort"
        assert len(output.outputs[0].token_ids) == count
        assert engine.abort(request_id) is None
    assert engine.abort("unknown") is None
    assert engine.step() == []
    assert not engine.has_work
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_metrics_count_tokens_and_seconds() -> None:
    engine = make_engine()
    request_id = engine.add(tokens([5, 6]), SamplingParams(n=2, max_tokens=6, ignore_eos=True))
    metrics = drain(engine)[request_id].metrics
    assert (metrics.num_prompt_tokens, metrics.num_generated_tokens) == (2, 12)
    assert metrics.time_to_first_token is not None
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    assert 0 < metrics.time_to_first_token < metrics.finished_time - metrics.arrival_time
    assert metrics.decode_tokens_per_second == pytest.approx(
        11 / (metrics.last_token_time - metrics.first_token_time)
    )


REFUSED = [
    ("", "empty string"),
    ({"prompt": ""}, "empty string"),
    (tokens([]), "no tokens"),
    (tokens([5, 128]), r"prompt_token_ids\[1\]: got 128, allowed an integer 0..127"),
    (tokens([-1]), r"got -1"),
    (tokens([1.0]), r"got 1.0"),
    (tokens(["a"]), r"got 'a'"),
    (tokens([True]), r"got True"),
    (tokens([2**40]), r"got 1099511627776"),
    (tokens(None), r"prompt_token_ids: got NoneType"),
    (tokens("abc"), r"prompt_token_ids: got str"),
    (5, "prompt: got int"),
    (None, "prompt: got NoneType"),
    ([5, 6], "prompt: got list"),
    ({}, r"prompt: got the keys \[\]"),
    ({"text": "x"}, r"prompt: got the keys \['text'\]"),
    ({"prompt": 7}, "prompt: got int"),
    ({"prompt": None}, "prompt: got NoneType"),
    ("x" * 63, "got 64 tokens, allowed at most 63: seq_length / max_model_len is 64"),
    (tokens([5] * 64), "got 64 tokens, allowed at most 63: seq_length / max_model_len is 64"),
]


@pytest.mark.parametrize(("prompt", "message"), REFUSED, ids=lambda v: repr(v)[:30])
def test_a_prompt_at_fault_is_refused_and_leaves_nothing(prompt: Any, message: str) -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=message) as raised:
        engine.add(prompt, SamplingParams())
    assert "\n" not in str(raised.value)
    assert not engine.has_work
    assert not engine.scheduler.has_work


def test_a_prompt_beyond_the_cache_is_refused_with_the_numbers() -> None:
    engine = make_engine(FakeRunner(num_blocks=5, block_size=4))
    with pytest.raises(
        RequestError, match=r"got 20 tokens, allowed at most 19: .* holds 20 \(5 blocks of 4\)"
    ):
        engine.add(tokens([5] * 20), SamplingParams())
    engine.add(tokens([5] * 19), SamplingParams(max_tokens=None))
    (output,) = drain(engine).values()
    assert len(output.outputs[0].token_ids) == 1


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_max_tokens_is_cut_to_what_fits(max_tokens: int | None) -> None:
    output = generate(SamplingParams(max_tokens=max_tokens, ignore_eos=True), prompt=[5] * 60)
    assert (len(output.token_ids), output.finish_reason) == (4, "length")


def test_token_ids_of_parameters_must_be_in_the_vocabulary() -> None:
    for params in (SamplingParams(stop_token_ids=[128]), SamplingParams(logit_bias={128: 1})):
        with pytest.raises(RequestError, match=r"got token id 128, allowed 0\.\.127"):
            make_engine().add(tokens([5]), params)


def test_a_request_id_is_used_once_at_a_time() -> None:
    engine = make_engine()
    engine.add(tokens([5]), SamplingParams(), request_id="mine")
    with pytest.raises(RequestError, match="request_id: got 'mine'"):
        engine.add(tokens([5]), SamplingParams(), request_id="mine")
    assert set(drain(engine)) == {"mine"}
    engine.add(tokens([5]), SamplingParams(), request_id="mine")
    assert set(drain(engine)) == {"mine"}


@pytest.mark.parametrize("seed", [-1, True, 2**64, "1"])
def test_an_impossible_seed_is_refused(seed: Any) -> None:
    with pytest.raises(ConfigError, match=r"seed: got .*, allowed an integer from 0"):
        make_engine(seed=seed)


def test_text_held_back_for_a_stop_string_comes_with_the_end() -> None:
    text = FakeTokenizer().decode(FakeRunner().greedy([20, 30, 40], 6))
    output = generate(SamplingParams(temperature=0, stop=text[-2:] + "never", max_tokens=6, ignore_eos=True))
    assert (output.text, output.finish_reason) == (text, "length")


def test_stop_strings_count_from_min_tokens_on() -> None:
    text = FakeTokenizer().decode(FakeRunner().greedy([20, 30, 40], 12))
    params = {"temperature": 0, "stop": [text[2], text[8]], "max_tokens": 12}
    assert generate(SamplingParams(**params)).text == text[:2]
    assert text[2] not in text[5:8]
    assert generate(SamplingParams(min_tokens=5, **params)).text == text[:8]

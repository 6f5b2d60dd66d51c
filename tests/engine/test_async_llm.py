"""AsyncLLM on a fake model: whatever readers do, each request ends once and every block comes back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from engine_fakes import FakeRunner, fake_llm
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_boost import LLM, AsyncLLM, RequestOutput, SamplingParams, StructuredOutputsParams
from llm_boost.engine.batch import Batch, FloatArray
from llm_boost.errors import EngineError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)


class GatedRunner(FakeRunner):
    """Runs a step for each permit; `open` gives them all."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self._permits = threading.Semaphore(0)
        self._open = False

    def allow(self, steps: int) -> None:
        self._permits.release(steps)

    def open(self) -> None:
        self._open = True
        self._permits.release()

    def run(self, batch: Batch) -> FloatArray:
        if not self._open:
            self._permits.acquire()
        return super().run(batch)


MakeLLM = Callable[..., LLM]


def idle(engine: AsyncLLM) -> bool:
    stats = engine.stats()
    return stats.num_running == stats.num_waiting == 0 and stats.num_used_blocks == 0


async def read(
    engine: AsyncLLM, prompt: Any, params: SamplingParams = GREEDY, **how: Any
) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, **how)]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


def serve(engine: AsyncLLM, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a test's coroutine; afterwards the engine is idle and whole."""

    async def main() -> None:
        async with engine:
            await work()
            await until(lambda: idle(engine))
            await engine.call(lambda: engine.llm.engine.blocks.check_integrity([]))

    asyncio.run(main())


def test_many_readers_at_once_get_what_generate_gives(make_llm: MakeLLM) -> None:
    prompts = [f"prompt {'x' * i}" for i in range(12)]
    expected = [output.outputs[0].text for output in make_llm().generate(prompts, GREEDY)]
    engine = AsyncLLM(make_llm(max_num_seqs=4))

    async def work() -> None:
        each = await asyncio.gather(*(read(engine, prompt) for prompt in prompts))
        for outputs, text in zip(each, expected, strict=True):
            assert outputs[-1].outputs[0].text == text
            assert "".join(output.outputs[0].delta for output in outputs) == text
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        stats = engine.stats()
        assert stats.num_generated_tokens == 12 * 20
        computed = sum(1 + len(p) for p in prompts) + 12 * 19
        assert stats.num_computed_tokens == computed - stats.num_hit_tokens
        assert stats.num_hit_tokens > 0
        assert 0 < stats.last_step_seconds <= stats.step_seconds

    serve(engine, work)


def test_not_streaming_gives_the_end_alone(make_llm: MakeLLM) -> None:
    engine = AsyncLLM(make_llm())

    async def work() -> None:
        (output,) = await read(engine, "hello", stream=False)
        assert output.finished
        assert output.outputs[0].delta == output.outputs[0].text != ""

    serve(engine, work)


def test_a_slow_reader_gets_everything_in_fewer_outputs(make_llm: MakeLLM) -> None:
    runner = GatedRunner()
    engine = AsyncLLM(make_llm(runner))

    async def work() -> None:
        outputs = engine.generate(
            "hello", SamplingParams(n=2, temperature=0.9, max_tokens=20, ignore_eos=True)
        )
        runner.allow(2)
        seen = [await anext(outputs)]
        runner.open()
        await until(lambda: idle(engine))  # all 20 steps are done before the reader looks again
        seen += [output async for output in outputs]
        assert 2 <= len(seen) <= 3
        for index in range(2):
            assert "".join(o.outputs[index].delta for o in seen) == seen[-1].outputs[index].text
            assert len(seen[-1].outputs[index].token_ids) == 20

    serve(engine, work)


def test_a_fast_reader_sees_each_step(make_llm: MakeLLM) -> None:
    runner = GatedRunner()
    engine = AsyncLLM(make_llm(runner))

    async def work() -> None:
        lengths = []
        runner.allow(1)
        async for output in engine.generate("hello", GREEDY):
            lengths.append(len(output.outputs[0].token_ids))
            runner.allow(1)
        assert lengths == list(range(1, 21))

    serve(engine, work)


def test_leaving_the_loop_aborts(make_llm: MakeLLM) -> None:
    engine = AsyncLLM(make_llm(FakeRunner(max_model_len=4096, num_blocks=2048)))

    async def work() -> None:
        outputs = engine.generate("hello", ENDLESS)
        async for _ in outputs:
            break
        await outputs.aclose()
        await until(lambda: idle(engine))

        task = asyncio.create_task(read(engine, "hello", ENDLESS))
        await until(lambda: engine.stats().num_running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: idle(engine))
        assert len((await read(engine, "hello"))[-1].outputs[0].token_ids) == 20

    serve(engine, work)


def test_abort_ends_the_reader_with_what_there_is(make_llm: MakeLLM) -> None:
    engine = AsyncLLM(make_llm(FakeRunner(max_model_len=4096, num_blocks=2048)))

    async def work() -> None:
        task = asyncio.create_task(read(engine, "hello", ENDLESS, request_id="me"))
        await until(lambda: engine.stats().num_running == 1)
        with pytest.raises(RequestError, match="request_id: got 'me', which is running"):
            await read(engine, "again", request_id="me")
        assert await engine.abort("me")
        last = (await task)[-1]
        assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")
        assert not await engine.abort("me")
        assert (await read(engine, "again", request_id="me"))[-1].outputs[0].finish_reason == "length"

    serve(engine, work)


def test_a_bad_request_raises_before_any_step(make_llm: MakeLLM) -> None:
    runner = FakeRunner()
    engine = AsyncLLM(make_llm(runner))

    async def work() -> None:
        for prompt, how, message in [
            ("", {}, "prompt: got an empty string"),
            ("x" * 64, {}, "prompt: got 65 tokens, allowed at most 63"),
            ("x", {"priority": 0.5}, "priority: got 0.5"),
            ("x", {"timeout": 0}, "timeout: got 0, allowed seconds above 0"),
            ("x", {"timeout": float("nan")}, "timeout: got nan"),
        ]:
            with pytest.raises(RequestError, match=message):
                await read(engine, prompt, **how)
        assert not runner.batches

    serve(engine, work)


def test_a_request_that_takes_too_long_keeps_what_it_has(make_llm: MakeLLM) -> None:
    runner = FakeRunner(max_model_len=1 << 20, num_blocks=1 << 18)
    engine = AsyncLLM(make_llm(runner))

    async def work() -> None:
        (completion,) = (await read(engine, "hello", ENDLESS, timeout=0.05))[-1].outputs
        assert completion.finish_reason == "timeout"
        assert completion.token_ids == runner.greedy([0, *b"hello"], len(completion.token_ids))

    serve(engine, work)


def test_urgent_requests_come_first(make_llm: MakeLLM) -> None:
    runner = GatedRunner()
    engine = AsyncLLM(make_llm(runner, max_num_seqs=1))
    ended: list[str] = []

    async def ask(name: str, priority: int) -> None:
        await read(engine, name, priority=priority)
        ended.append(name)

    async def work() -> None:
        tasks = []
        for count, (name, priority) in enumerate([("a", 0), ("b", 2), ("c", 1), ("d", 1), ("e", -1)]):
            tasks.append(asyncio.create_task(ask(name, priority)))
            if count:  # the first one is in its step, and reads its inbox after
                await until(lambda: engine._thread._inbox.qsize() == len(tasks) - 1)
            else:
                await until(lambda: engine.stats().num_running == 1)
        runner.open()
        await asyncio.gather(*tasks)
        assert ended == ["a", "e", "c", "d", "b"]

    serve(engine, work)


def test_a_model_that_fails_ends_its_requests_and_not_the_engine(make_llm: MakeLLM) -> None:
    runner = FakeRunner()
    engine = AsyncLLM(make_llm(runner))

    async def work() -> None:
        runner.crash = True
        with pytest.raises(EngineError, match="the fake model crashed"):
            await read(engine, "hello")
        runner.crash = False
        engine.check_health()
        assert (await read(engine, "hello"))[-1].finished

    serve(engine, work)


def test_an_engine_that_dies_fails_all_its_readers(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = GatedRunner()
    engine = AsyncLLM(make_llm(runner, max_num_seqs=1))

    def broken(now: float) -> None:
        raise MemoryError("no more")

    async def work() -> None:
        tasks = [asyncio.create_task(read(engine, prompt)) for prompt in ("a", "b", "c")]
        await until(lambda: engine.stats().num_running == 1)
        monkeypatch.setattr(engine.llm.engine.scheduler, "schedule", broken)
        late = asyncio.create_task(engine.call(lambda: None))
        runner.open()
        for task in tasks:
            with pytest.raises(EngineError, match="the engine stopped: MemoryError: no more"):
                await task
        await asyncio.wait([late])
        assert engine.errored
        with pytest.raises(EngineError, match="MemoryError"):
            engine.check_health()
        with pytest.raises(EngineError, match="MemoryError"):
            await read(engine, "d")
        await asyncio.to_thread(engine.close)

    asyncio.run(work())


def test_closing_ends_every_reader(make_llm: MakeLLM) -> None:
    engine = AsyncLLM(make_llm(FakeRunner(max_model_len=4096, num_blocks=2048)))

    async def work() -> None:
        tasks = [asyncio.create_task(read(engine, "a", ENDLESS)) for _ in range(3)]
        await until(lambda: engine.stats().num_running == 3)
        await asyncio.to_thread(engine.close)
        assert [outputs[-1].outputs[0].finish_reason for outputs in await asyncio.gather(*tasks)] == [
            "abort"
        ] * 3
        with pytest.raises(EngineError, match="the engine was closed"):
            await read(engine, "b")
        engine.close()

    asyncio.run(work())


def test_draining_lets_requests_end_and_takes_no_more(make_llm: MakeLLM) -> None:
    runner = GatedRunner()
    engine = AsyncLLM(make_llm(runner))

    async def work() -> None:
        task = asyncio.create_task(read(engine, "hello"))
        await until(lambda: engine.stats().num_running == 1)
        assert not await engine.drain(timeout=0.02)
        with pytest.raises(EngineError, match="drained"):
            await read(engine, "late")
        runner.open()
        assert await engine.drain()
        assert (await task)[-1].outputs[0].finish_reason == "length"

    serve(engine, work)


def test_a_reader_whose_loop_has_gone_is_aborted(make_llm: MakeLLM) -> None:
    runner = GatedRunner(max_model_len=4096, num_blocks=2048)
    engine = AsyncLLM(make_llm(runner))
    loop = asyncio.new_event_loop()
    outputs = engine.generate("hello", ENDLESS)
    first = loop.create_task(anext(outputs))  # type: ignore[arg-type]
    runner.allow(1)
    loop.run_until_complete(first)
    loop.close()
    runner.open()
    serve(engine, lambda: until(lambda: idle(engine)))


def test_the_watchdog_sees_a_step_that_hangs(make_llm: MakeLLM) -> None:
    runner = GatedRunner()
    engine = AsyncLLM(make_llm(runner))

    async def work() -> None:
        now = time.monotonic()
        assert engine.last_step_time >= now  # idle, not stuck
        task = asyncio.create_task(read(engine, "hello"))
        await until(lambda: time.monotonic() - engine.last_step_time > 0.1)
        runner.open()
        await task

    serve(engine, work)


def test_chat_goes_through_the_template(make_llm: MakeLLM) -> None:
    engine = AsyncLLM(make_llm())

    async def work() -> None:
        messages = [{"role": "user", "content": "hello"}]
        outputs = [output async for output in engine.chat(messages, GREEDY)]
        assert outputs[-1].prompt == "user:hello;assistant:"
        assert outputs[-1].outputs[0].text == engine.llm.engine._tokenizer.decode(
            FakeRunner().greedy(b"user:hello;assistant:", 20)
        )

    serve(engine, work)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 30),  # tokens of the prompt
            st.sampled_from(["read", "read", "slow", "leave", "abort", "cancel", "timeout"]),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(16, 40),
)
@settings(max_examples=25, deadline=None)
def test_whatever_readers_do_every_block_comes_back(
    script: list[tuple[int, str, int]], num_blocks: int
) -> None:

    runner = FakeRunner(num_blocks=num_blocks)
    engine = AsyncLLM(fake_llm(runner, max_num_seqs=3, max_num_batched_tokens=16))

    async def one(number: int, length: int, how: str, pause: int) -> None:
        prompt = [2 + number] * length
        outputs = engine.generate(
            {"prompt_token_ids": prompt}, GREEDY, str(number), timeout=0.003 if how == "timeout" else None
        )
        last = None
        async for last in outputs:
            if how == "slow":
                await asyncio.sleep(0.001 * pause)
            if len(last.outputs[0].token_ids) >= pause:
                if how == "leave":
                    return await outputs.aclose()
                if how == "abort":
                    await engine.abort(str(number))
        assert last is not None
        assert last.finished
        expected = runner.greedy(prompt, 20)
        (completion,) = last.outputs
        assert completion.token_ids == expected[: len(completion.token_ids)]
        if how in ("read", "slow"):
            assert completion.token_ids == expected
        return None

    async def work() -> None:
        tasks = []
        for number, (length, how, pause) in enumerate(script):
            tasks.append(asyncio.create_task(one(number, length, how, pause)))
            await asyncio.sleep(0.001 * (pause % 2))
            if how == "cancel":
                tasks[-1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), (
            results
        )

    serve(engine, work)


def test_three_hundred_readers_with_every_wish_and_some_faults() -> None:
    """Slow readers, rules, scored prompts, and requests that fail among the others: all get their own."""
    runner = FakeRunner(num_blocks=300)
    runner.poisoned_tokens = {99}  # a prompt that ends with it gets NaN
    wishes: list[dict[str, Any]] = [
        {},
        {"n": 2},
        {"prompt_logprobs": 1},
        {"logprobs": 2},
        {"structured_outputs": StructuredOutputsParams(regex="[d-f]{4}")},
        {"best_of": 3},
        {"bad_words": ["k"]},
    ]

    def params(number: int) -> SamplingParams:
        never = {99: -100.0}
        return SamplingParams(
            temperature=1, seed=number, max_tokens=12, logit_bias=never, **wishes[number % len(wishes)]
        )

    def prompt(number: int) -> Any:
        return {"prompt_token_ids": [2 + number % 90, 5, 6, 99 if number % 50 == 49 else 7]}

    async def one(engine: AsyncLLM, number: int) -> list[str] | str:
        texts = []
        try:
            async for output in engine.generate(prompt(number), params(number)):
                texts = [completion.text for completion in output.outputs]
                if number % 3 == 0:
                    await asyncio.sleep(0.002)
        except EngineError as error:
            return str(error)
        return texts

    engine = AsyncLLM(fake_llm(runner, max_num_seqs=32, max_num_batched_tokens=64))
    results: list[list[str] | str] = []

    async def work() -> None:
        results.extend(await asyncio.gather(*(one(engine, number) for number in range(300))))

    serve(engine, work)
    alone = fake_llm(FakeRunner(num_blocks=300))
    for number, result in enumerate(results):
        if number % 50 == 49:
            assert "NaN" in result
        else:
            (output,) = alone.generate(prompt(number), params(number))
            assert result == [completion.text for completion in output.outputs]

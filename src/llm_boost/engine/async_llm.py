"""AsyncLLM: LLM for asyncio programs, such as a service."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llm_boost.engine.engine_thread import EngineThread
from llm_boost.engine.llm import LLM, Message
from llm_boost.engine.output_slot import OutputSlot
from llm_boost.engine.outputs import RequestOutput
from llm_boost.engine.prompts import Prompt
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.stats import EngineStats
from llm_boost.errors import EngineError

if TYPE_CHECKING:
    from llm_boost.models.config import ModelConfig
    from llm_boost.tokenization import Tokenizer

T = TypeVar("T")

_INTAKE_THREADS = 4  # tokenise and check requests, beside the engine's thread and the event loop's
_GRAMMAR_THREADS = (
    2  # the same for requests with a grammar, which may take seconds: others do not wait for them
)


class AsyncLLM:
    """A model that completes many prompts at a time, each an asynchronous stream.

    The engine runs in a thread of its own; prompts are tokenised and checked in others, so the event loop
    never waits for either. Use it from any number of tasks.

    Args:
        model: what LLM takes, or an LLM that is loaded already and is not used otherwise from now on.
        options: LLM's.
    """

    def __init__(self, model: str | Path | LLM, **options: Any) -> None:
        self._llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._engine = self._llm.engine
        self._thread = EngineThread(self._engine)
        self._intake = ThreadPoolExecutor(_INTAKE_THREADS, "llm-boost-intake")
        self._grammars = ThreadPoolExecutor(_GRAMMAR_THREADS, "llm-boost-grammar")
        self._end = weakref.finalize(self, _end, self._thread, self._intake, self._grammars)  # at exit too

    @property
    def tokenizer(self) -> Tokenizer:
        return self._llm.tokenizer

    @property
    def model_config(self) -> ModelConfig:
        return self._llm.model_config

    @property
    def llm(self) -> LLM:
        """What it is made of, to ask for its properties; never to generate with."""
        return self._llm

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        stream: bool = True,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes a prompt: outputs as they grow, the last one `finished`.

        Each output holds all there is so far, and its `delta` what is new to this reader; one slower than the
        engine sees fewer, larger outputs. Leaving the loop early, or cancelling the task, aborts.

        Args:
            sampling_params: by default the model's own.
            request_id: for `abort`; unique among the requests under way.
            priority: lower comes first; see `Engine.prepare`.
            timeout: seconds until it is ended with the finish reason "timeout".
            stream: False gives the last output alone.

        Raises:
            RequestError: the prompt or a parameter is out of range; nothing has run.
            EngineError: the model or the engine failed, or the engine was closed or is being drained.
        """
        self._thread.check_accepts()
        params = self._llm.default_sampling_params() if sampling_params is None else sampling_params
        request = await self._aside(
            partial(
                self._engine.prepare,
                prompt,
                params,
                request_id=uuid.uuid4().hex if request_id is None else request_id,
                priority=priority,
                timeout=timeout,
                stream=stream,
            ),
            self._intake if params.structured_outputs is None else self._grammars,
        )
        slot = OutputSlot(asyncio.get_running_loop())
        self._thread.add(request, slot)
        finished = False
        try:
            while not finished:
                output = await slot.take()
                finished = output.finished
                if output.error is not None:
                    raise EngineError(f"request {output.request_id}: {output.error}")
                yield output
        finally:
            if not finished:
                with contextlib.suppress(EngineError):  # it has ended, and the request with it
                    self._thread.abort(request.request_id)

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        stream: bool = True,
        **template_options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers a conversation through the model's chat template, as `generate` completes a prompt."""
        (prompt,) = await self._aside(partial(self._llm.chat_prompts, list(messages), **template_options))
        outputs = self.generate(
            prompt, sampling_params, request_id, priority=priority, timeout=timeout, stream=stream
        )
        async with contextlib.aclosing(outputs):  # left early, it aborts at once
            async for output in outputs:
                yield output

    async def abort(self, request_id: str) -> bool:
        """Ends a request: its reader gets the finish reason "abort". False if it is not under way."""
        return await asyncio.wrap_future(self._thread.abort(request_id))

    async def call(self, work: Callable[[], T]) -> T:
        """Has the engine's thread do something between two steps: to look at the engine, or to change it."""
        return await asyncio.wrap_future(self._thread.call(work))

    def stats(self) -> EngineStats:
        return self._engine.stats()

    @property
    def errored(self) -> bool:
        """The engine has ended: it was closed, or it died."""
        return self._thread.error is not None

    def check_health(self) -> None:
        """EngineError, with the reason, when the engine has ended."""
        self._thread.check_health()

    @property
    def last_step_time(self) -> float:
        """When the engine last began a step, in monotonic seconds; now, while there is nothing to do.

        A watchdog compares it with the time: a step that lasts minutes will never end.
        """
        return self._thread.last_step_time

    async def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits for those under way; False if some still are after `timeout` s."""
        return await self._aside(partial(self._thread.drain, timeout))

    def close(self) -> None:
        """Aborts what still runs, which its readers get as their last output, and ends the thread."""
        self._end()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    async def _aside(self, work: Callable[[], T], pool: ThreadPoolExecutor | None = None) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool or self._intake, work)


def _end(thread: EngineThread, *pools: ThreadPoolExecutor) -> None:
    thread.close()
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)

"""What all API families share: the backend, its phase, and the way of a request through it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from llm_boost.backends import Backend
from llm_boost.config.service_config import ServiceConfig
from llm_boost.engine.outputs import RequestOutput
from llm_boost.engine.prompts import TokensPrompt
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.structured_outputs import StructuredOutputsParams
from llm_boost.errors import EngineError, LLMBoostError, RequestError
from llm_boost.service.admission import Admission
from llm_boost.service.faults import Fault, invalid
from llm_boost.service.idle_timeout import IdleTimeout
from llm_boost.service.logs import log
from llm_boost.service.metrics import Metrics, Record
from llm_boost.service.tracing import Tracing
from llm_boost.suggest import did_you_mean


class Phase(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass
class Ask:
    """A request in the engine's terms, whatever API it came by."""

    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or a conversation
    sampling: dict[str, Any]  # SamplingParams' names; what is missing comes from the model
    stream: bool = False
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    priority: int = 0
    timeout: float | None = None  # seconds, of the client's own choice
    keep_last: int | None = None  # tokens of the prompt to keep
    template_options: dict[str, Any] = field(default_factory=dict)


class Service:
    """One model, served. Lives in one event loop."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config
        limits = config.limits
        self.admission = Admission(limits.max_running, limits.max_queued, limits.max_queued_tokens)
        self.metrics = Metrics(config.name)
        self.tracing = Tracing()
        self.phase = Phase.LOADING
        self.failure: str | None = None
        self.load_progress = 0.0
        self.started = time.time()
        self.stop_requested = asyncio.Event()
        self._backend: Backend | None = None
        self._waits: dict[str, anyio.CancelScope] = {}  # of requests that wait for a place, by their id
        self._probe: asyncio.Task[None] | None = None

    @property
    def backend(self) -> Backend:
        """The loaded backend; a fault "unavailable" before there is one."""
        if self._backend is None:
            raise self.unavailable()
        return self._backend

    def start(self, backend: Backend) -> None:
        """From here on requests are taken."""
        self._backend = backend
        self.metrics.watch(backend, self.admission)
        self.phase = Phase.READY

    def fail(self, reason: str) -> None:
        """The engine is lost: nothing is taken any more, and health says so."""
        self.phase, self.failure = Phase.FAILED, reason

    def unavailable(self) -> Fault:
        if self.phase is Phase.LOADING:
            return Fault(
                "unavailable",
                f"The model is being loaded ({100 * self.load_progress:.0f} % of its weights packed).",
                retry_after=5,
            )
        if self.phase is Phase.FAILED:
            return Fault("failed", f"The engine has failed: {self.failure}")
        return Fault("unavailable", "The service has been stopped.", retry_after=30)

    def check_accepts(self, requests: int = 1) -> None:
        if self.phase is not Phase.READY:
            raise self.unavailable()
        self.admission.check(requests)

    async def drain(self, timeout: float) -> bool:
        """Takes no more requests; True when those under way have ended within so many seconds."""
        self.phase = Phase.DRAINING
        if self._backend is None:
            return True
        with anyio.move_on_after(timeout):
            while self.admission.running or self.admission.queued:
                await asyncio.sleep(0.02)
            return await self._backend.drain(1.0)
        return False

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()

    def sampling_params(self, given: Mapping[str, Any]) -> SamplingParams:
        """The model's own defaults, and over them what a request gives; or a RequestError."""
        most, n = self.config.limits.max_n, max(given.get("n") or 1, given.get("best_of") or 1)
        if n > most:
            raise invalid(
                f"The n parameter ({n}) exceeds 'maxN' ({most}). Please reduce n or increase 'maxN' in "
                "config.json of mindie-service.",
                "n",
            )
        given = {name: value for name, value in given.items() if value is not None}
        self._check_capabilities(given)
        if "structured_outputs" in given:
            given["structured_outputs"] = structured_outputs(given["structured_outputs"])
        own = self.backend.default_sampling_params()
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        defaults = {"max_tokens": None, **{name: getattr(own, name) for name in names}}
        return SamplingParams(**{**defaults, **given})

    def _check_capabilities(self, given: Mapping[str, Any]) -> None:
        can, name = self.backend.capabilities, self.backend.name
        for parameter, able in (("logprobs", can.logprobs), ("structured_outputs", can.structured_output)):
            if parameter in given and not able:
                raise invalid(f"{parameter}: the engine {name} does not have them.", parameter)

    async def generate(self, ask: Ask) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as they grow when the request streams, else the last one alone.

        Raises a Fault before the first output: overloaded, unavailable, too long, out of range; or at any
        time when the engine fails or a time limit is reached. Closing the generator aborts the request.
        """
        self.check_accepts()
        start = time.monotonic()
        with _as_faults():
            params = self._bounded(self.sampling_params(ask.sampling))
            prompt = await self._tokens(ask)
        tokens = len(prompt["prompt_token_ids"])
        with self._followed(ask, prompt, start) as record:
            async with self._in_time(ask, start, self.admission.place(tokens)):
                outputs = self.backend.generate(
                    prompt,
                    params,
                    ask.request_id,
                    priority=ask.priority,
                    timeout=self._remaining(ask, start)[0],
                    stream=ask.stream or self.config.limits.token_timeout < self._seconds(ask)[0],
                )
                async with contextlib.aclosing(outputs):
                    async for output in self._watched(outputs, ask, start):
                        record.output = output
                        if ask.stream or output.finished:
                            yield output

    @contextlib.contextmanager
    def _followed(self, ask: Ask, prompt: TokensPrompt, start: float) -> Iterator[Record]:
        """Counts, traces and, if prompts may be logged, logs a request, however it ends."""
        tokens = len(prompt["prompt_token_ids"])
        with self.metrics.request(start, tokens) as record:
            try:
                yield record
            finally:
                output = record.output
                self.tracing.generation(self.config.name, start, tokens, output)
                if self.config.log.prompts:
                    texts = [completion.text for completion in output.outputs] if output else []
                    extra = {"request_id": ask.request_id, "prompt": prompt.get("prompt"), "texts": texts}
                    log.info("generation", extra=extra)

    async def answer(self, ask: Ask) -> RequestOutput:
        """The last output of a request."""
        async with contextlib.aclosing(self.generate(ask)) as outputs:
            async for output in outputs:
                last = output
        return last

    async def _watched(
        self, outputs: AsyncGenerator[RequestOutput, None], ask: Ask, start: float
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs; a Fault when a token or the whole takes too long, or the engine fails."""
        with _as_faults(), IdleTimeout(self.config.limits.token_timeout) as per_token:
            while True:
                try:
                    output = await per_token.wait(anext(outputs))
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise _timeout("server tokenTimeout") from None
                if any(completion.finish_reason == "timeout" for completion in output.outputs):
                    raise _timeout(self._seconds(ask)[1])
                yield output

    @contextlib.asynccontextmanager
    async def _in_time(self, ask: Ask, start: float, place: Any) -> AsyncGenerator[None, None]:
        """Waits for a place no longer than the request may take."""
        seconds, whose = self._remaining(ask, start)
        async with contextlib.AsyncExitStack() as stack:
            try:
                with anyio.fail_after(seconds) as self._waits[ask.request_id]:
                    await stack.enter_async_context(place)
            except TimeoutError:
                raise _timeout(whose) from None
            finally:
                stopped = self._waits.pop(ask.request_id).cancel_called
            if stopped:
                raise Fault("failed", "The request was stopped before it ran.")
            self.check_phase()
            yield

    async def abort(self, request_id: str) -> bool:
        """Ends a request that runs or waits; False if there is none of this id."""
        wait = self._waits.get(request_id)
        if wait is not None:
            wait.cancel()
            return True
        return await self.backend.abort(request_id)

    async def makes_a_token(self, seconds: float) -> bool:
        """Whether the engine makes a token within so many seconds. Those who ask together share one."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.ensure_future(self._make_a_token(self.backend))
        probe = self._probe
        with anyio.move_on_after(seconds):
            await asyncio.wait([probe])
        return probe.done() and not probe.cancelled() and probe.exception() is None

    async def _make_a_token(self, backend: Backend) -> None:
        params = SamplingParams(max_tokens=1, temperature=0)
        name = f"health-{uuid.uuid4().hex}"
        prompt: TokensPrompt = {"prompt_token_ids": [min(backend.tokenizer.eos_token_ids, default=0)]}
        async with contextlib.aclosing(backend.generate(prompt, params, name, priority=-1000)) as outputs:
            async for _ in outputs:
                pass

    def check_phase(self) -> None:
        if self.phase is Phase.FAILED:
            raise self.unavailable()

    def _seconds(self, ask: Ask) -> tuple[float, str]:
        """The time that a request may take, and whose limit that is."""
        server = self.config.limits.e2e_timeout
        if ask.timeout is not None and ask.timeout < server:
            return ask.timeout, "client timeout"
        return server, "server e2eTimeout"

    def _remaining(self, ask: Ask, start: float) -> tuple[float, str]:
        seconds, whose = self._seconds(ask)
        return max(seconds - (time.monotonic() - start), 0.001), whose

    def _bounded(self, params: SamplingParams) -> SamplingParams:
        longest = self.config.max_output_tokens
        if longest is not None and (params.max_tokens is None or params.max_tokens > longest):
            params = replace(params, max_tokens=longest, min_tokens=min(params.min_tokens, longest))
        return params

    async def _tokens(self, ask: Ask) -> TokensPrompt:
        prompt = await asyncio.to_thread(self._encode, ask)
        ids = prompt["prompt_token_ids"]
        if ask.keep_last is not None:
            ids = ids[-ask.keep_last :]
        most = self.config.max_input_tokens
        if most is not None and len(ids) > most:
            if self.config.truncation == "refuse":
                raise Fault(
                    "too_long",
                    f"This model's maximum input ids length cannot be greater than {most}, "
                    f"the input ids length is {len(ids)}",
                )
            ids = ids[:most] if self.config.truncation == "keep_first" else ids[-most:]
        return {**prompt, "prompt_token_ids": ids}

    def _encode(self, ask: Ask) -> TokensPrompt:
        prompt = ask.prompt
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("prompt: got an empty string, allowed at least one character")
            return {"prompt": prompt, "prompt_token_ids": self.backend.tokenizer.encode(prompt)}
        if prompt and isinstance(prompt[0], Mapping):
            chat: Any = self.backend.chat_prompt(prompt, **ask.template_options)  # type: ignore[arg-type]
            return {"prompt": chat["prompt"], "prompt_token_ids": chat["prompt_token_ids"]}
        return {"prompt_token_ids": list(prompt)}  # type: ignore[arg-type]


def structured_outputs(given: Mapping[str, Any]) -> StructuredOutputsParams:
    """A request's rule for its text; RequestError for a name or a value that is none."""
    names = StructuredOutputsParams.__dataclass_fields__
    for name in given:
        if name not in names:
            raise RequestError(
                f"structured_outputs.{name[:80]}: no such rule{did_you_mean(name, names)}; "
                f"allowed: {', '.join(names)}"
            )
    return StructuredOutputsParams(**given)


def default_max_tokens(service: Service) -> int | None:
    """Of a completion that names none: OpenAI's 16, under a config.json its maxIterTimes."""
    return None if service.config.mindie else 16


@contextlib.contextmanager
def _as_faults() -> Any:
    """What the engine and the tokenizer say, as what clients are told."""
    try:
        yield
    except Fault:
        raise
    except RequestError as error:
        message = str(error)
        name = message.partition(":")[0]
        if name == "prompt" and "tokens, allowed at most" in message:
            raise Fault("too_long", message, param="prompt") from None
        raise invalid(message, name if name.isidentifier() else None) from None
    except (EngineError, LLMBoostError) as error:
        raise Fault("failed", str(error)) from error


def _timeout(whose: str) -> Fault:
    return Fault("failed", f"Engine callback timeout: {whose}")

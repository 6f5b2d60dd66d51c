"""What OpenAI's two generating endpoints share: from requests to one answer, or to one stream of events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response

from llm_boost.engine.outputs import CompletionOutput, RequestOutput
from llm_boost.service.choices import Follower, News, merged
from llm_boost.service.endpoint import Call
from llm_boost.service.events import EventStream, sse_event
from llm_boost.service.faults import Fault
from llm_boost.service.openai_models import SamplingBody
from llm_boost.service.service import Ask, Service

DONE = b"data: [DONE]\n\n"


@dataclass
class Head:
    """What every object of an answer begins with."""

    id: str
    object: str
    chunk_object: str  # of streamed answers
    created: int
    model: str

    def whole(self) -> dict[str, Any]:
        return {"id": self.id, "object": self.object, "created": self.created, "model": self.model}

    def chunk(self) -> dict[str, Any]:
        return {**self.whole(), "object": self.chunk_object}


class Style(Protocol):
    """How an endpoint shows its choices."""

    head: Head

    def choices(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        """Those of one finished request; `number`: which of the call's requests it is."""
        ...

    def opening(self, number: int) -> Iterable[dict[str, Any]]:
        """Choices of the events that come before a request's first text."""
        ...

    def chunk(self, number: int, news: News, full_text: bool) -> Iterable[dict[str, Any]]:
        """Choices of the events that tell of what is new."""
        ...


def head(call: Call, prefix: str, object_: str, chunk_object: str) -> Head:
    model = call.body.model or call.service.config.name
    return Head(f"{prefix}-{call.ask_id}", object_, chunk_object, int(time.time()), model)


def check_model(service: Service, name: str | None) -> None:
    config = service.config
    if config.tgi_shapes == "strict":  # as in TGI, whose clients send any name
        return
    if name is not None and name not in config.served_names:
        allowed = ", ".join(config.served_names)
        raise Fault("not_found", f"Model not found: got {name[:80]!r}, allowed: {allowed}", param="model")


def ask(call: Call, prompt: Any, sampling: dict[str, Any], number: int = 0) -> Ask:
    body: SamplingBody = call.body
    return Ask(
        prompt,
        sampling,
        stream=bool(body.stream),
        request_id=f"{call.ask_id}-{number}",
        priority=body.priority or 0,
        timeout=body.timeout,
    )


async def answer(call: Call, asks: list[Ask], style: Style) -> Response:
    if call.body.stream:
        return await EventStream.start(_events(call, asks, style), call.service.config.limits.write_timeout)
    async with contextlib.aclosing(merged([call.service.generate(ask) for ask in asks])) as stream:
        outputs = {number: output async for number, output in stream}
    choices = [choice for number in range(len(asks)) for choice in style.choices(number, outputs[number])]
    return JSONResponse({**style.head.whole(), "choices": choices, "usage": usage(outputs.values())})


async def _events(call: Call, asks: list[Ask], style: Style) -> AsyncGenerator[bytes, None]:
    config, options = call.service.config, call.body.stream_options
    each_usage = bool(options and options.continuous_usage_stats)
    last: dict[int, RequestOutput] = {}
    followers = [Follower() for _ in asks]
    try:
        async with contextlib.aclosing(merged([call.service.generate(ask) for ask in asks])) as stream:
            async for number, output in stream:
                if number not in last:
                    for choice in style.opening(number):
                        yield sse_event({**style.head.chunk(), "choices": [choice]})
                last[number] = output
                for news in followers[number].news(output):
                    for choice in style.chunk(number, news, config.full_text):
                        event = {**style.head.chunk(), "choices": [choice]}
                        ends = choice["finish_reason"] is not None
                        if each_usage or (config.mindie and ends):
                            event["usage"] = usage(last.values())
                        if config.full_text and ends:
                            event["full_text"] = news.completion.text
                        yield sse_event(event)
    except Fault as fault:
        if not last:  # nothing was sent yet: the fault becomes the answer's status
            raise
        call.notes["fault"] = str(fault)
        yield sse_event(call.shape(fault).body)
    else:
        if options and options.include_usage:
            yield sse_event({**style.head.chunk(), "choices": [], "usage": usage(last.values())})
    yield DONE


def finish_reason(completion: CompletionOutput) -> str:
    return "length" if completion.finish_reason == "length" else "stop"


def usage(outputs: Iterable[RequestOutput]) -> dict[str, int]:
    found = list(outputs)
    prompt = sum(len(output.prompt_token_ids) for output in found)
    new = sum(len(completion.token_ids) for output in found for completion in output.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

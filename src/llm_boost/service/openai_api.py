"""OpenAI's API: models, completions and chat."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from llm_boost.engine.outputs import CompletionOutput, Logprob, RequestOutput
from llm_boost.service.choices import Follower, News, merged
from llm_boost.service.endpoint import Call, Endpoint
from llm_boost.service.events import STREAMS, EventStream, sse_event
from llm_boost.service.faults import Fault, invalid
from llm_boost.service.openai_models import ChatRequest, CompletionRequest, SamplingBody
from llm_boost.service.service import Ask, Service

DONE = b"data: [DONE]\n\n"


async def list_models(call: Call) -> Response:
    service = call.service
    return JSONResponse({"object": "list", "data": [_model(service, n) for n in service.config.served_names]})


async def show_model(call: Call) -> Response:
    name = call.path("model")
    _check_model(call.service, name)
    return JSONResponse(_model(call.service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "MindIE Server" if service.config.mindie else "llm-boost",
        "root": service.config.name,
        "parent": None,
    }


def _check_model(service: Service, name: str | None) -> None:
    config = service.config
    if config.tgi_shapes == "strict":  # as in TGI, whose clients send any name
        return
    if name is not None and name not in config.served_names:
        allowed = ", ".join(config.served_names)
        raise Fault("not_found", f"Model not found: got {name!r}, allowed: {allowed}", param="model")


# ---- completions


async def completions(call: Call) -> Response:
    body: CompletionRequest = call.body
    _check_model(call.service, body.model)
    if body.echo and body.stream:
        raise invalid("echo is not supported when stream is true.", "echo")
    prompts = _prompts(body)
    call.service.check_accepts(len(prompts))
    sampling = {**body.sampling(), "max_tokens": body.max_tokens, "logprobs": body.logprobs}
    asks = [_ask(call, body, prompt, sampling, i) for i, prompt in enumerate(prompts)]
    style = CompletionStyle(_reply(call, "cmpl", "text_completion"), body.n or 1, call)
    return await _answer(call, body, asks, style)


def _prompts(body: CompletionRequest) -> list[Any]:
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise invalid("prompt: got an empty list, allowed at least one prompt.", "prompt")
    return list(prompt)


@dataclass
class Reply:
    """What every object of an answer begins with."""

    id: str
    object: str
    created: int
    model: str

    def head(self, object_: str | None = None) -> dict[str, Any]:
        return {"id": self.id, "object": object_ or self.object, "created": self.created, "model": self.model}


class CompletionStyle:
    """Answers in the form of /v1/completions."""

    def __init__(self, reply: Reply, n: int, call: Call) -> None:
        self.reply, self._n, self._call = reply, n, call
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def whole(self, outputs: list[RequestOutput], asks: list[Ask]) -> dict[str, Any]:
        body: CompletionRequest = self._call.body
        choices = [
            self._choice(number, completion, (output.prompt or "") if body.echo else "")
            for number, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return {**self.reply.head(), "choices": choices, "usage": usage(outputs)}

    def _choice(self, number: int, completion: CompletionOutput, echo: str) -> dict[str, Any]:
        return {
            "index": number * self._n + completion.index,
            "text": echo + completion.text,
            "logprobs": self._logprobs(completion.token_ids, completion.logprobs, len(echo)),
            "finish_reason": finish_reason(completion),
            "stop_reason": completion.stop_reason,
        }

    def opening(self, number: int) -> Iterable[dict[str, Any]]:
        return ()

    def chunk(self, number: int, news: News, full_text: bool) -> list[dict[str, Any]]:
        index = number * self._n + news.index
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(news.text)
        choice = {
            "index": index,
            "text": news.completion.text if full_text else news.text,
            "logprobs": self._logprobs(news.token_ids, news.logprobs or None, offset),
            "finish_reason": finish_reason(news.completion) if news.ends else None,
            "stop_reason": news.completion.stop_reason if news.ends else None,
        }
        return [{**self.reply.head(), "choices": [choice]}]

    def _logprobs(
        self, token_ids: list[int], logprobs: list[dict[int, Logprob]] | None, offset: int
    ) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        tokens, offsets = [], []
        for token, entry in zip(token_ids, logprobs, strict=False):
            tokens.append(entry[token].decoded_token)
            offsets.append(offset)
            offset += len(entry[token].decoded_token)
        return {
            "text_offset": offsets,
            "token_logprobs": [entry[t].logprob for t, entry in zip(token_ids, logprobs, strict=False)],
            "tokens": tokens,
            "top_logprobs": [{p.decoded_token: p.logprob for p in entry.values()} for entry in logprobs],
        }


# ---- chat


async def chat_completions(call: Call) -> Response:
    body: ChatRequest = call.body
    _check_model(call.service, body.model)
    if body.top_logprobs is not None and body.logprobs is False:
        raise invalid(
            "Value error, when using top_logprobs, logprobs must be true or null in chat completions",
            "top_logprobs",
        )
    call.service.check_accepts()
    wants_logprobs = body.logprobs or body.top_logprobs is not None
    sampling = {
        **body.sampling(),
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "logprobs": (body.top_logprobs or 0) if wants_logprobs else None,
    }
    ask = _ask(call, body, [message.for_template() for message in body.messages], sampling, 0)
    ask.template_options = _template_options(body)
    if body.add_generation_prompt is not None:
        ask.template_options["add_generation_prompt"] = body.add_generation_prompt
    style = ChatStyle(_reply(call, "chatcmpl", "chat.completion"), body, wants_logprobs=bool(wants_logprobs))
    return await _answer(call, body, [ask], style)


def _template_options(body: ChatRequest) -> dict[str, Any]:
    options = dict(body.chat_template_kwargs or {})
    taken = {"chat_template", "messages", "tools", "add_generation_prompt"} & options.keys()
    if body.chat_template is not None or taken:
        name = min(taken, default="chat_template")
        raise invalid(f"{name}: templates of requests are not run; the model's own is.", name)
    return options


class ChatStyle:
    """Answers in the form of /v1/chat/completions."""

    def __init__(self, reply: Reply, body: ChatRequest, *, wants_logprobs: bool) -> None:
        self.reply, self._body, self._wants_logprobs = reply, body, wants_logprobs

    def whole(self, outputs: list[RequestOutput], asks: list[Ask]) -> dict[str, Any]:
        choices = [
            {
                "index": completion.index,
                "message": {"role": "assistant", "content": completion.text},
                "logprobs": self._logprobs(completion.token_ids, completion.logprobs),
                "finish_reason": finish_reason(completion),
                "stop_reason": completion.stop_reason,
            }
            for completion in outputs[0].outputs
        ]
        return {**self.reply.head(), "choices": choices, "usage": usage(outputs)}

    def opening(self, number: int) -> Iterable[dict[str, Any]]:
        for index in range(self._body.n or 1):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, None, None)

    def chunk(self, number: int, news: News, full_text: bool) -> list[dict[str, Any]]:
        text = news.completion.text if full_text else news.text
        delta: dict[str, Any] = {"content": text} if text else {}
        ending = finish_reason(news.completion) if news.ends else None
        logprobs = self._logprobs(news.token_ids, news.logprobs or None)
        if not (delta or logprobs or news.ends):  # a token whose text has yet to become whole
            return []
        return [self._chunk(news.index, delta, logprobs, ending, news.completion.stop_reason)]

    def _chunk(self, index: int, delta: Any, logprobs: Any, ending: str | None, stop: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": ending}
        if ending is not None:
            choice["stop_reason"] = stop
        return {**self.reply.head("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(
        self, token_ids: list[int], logprobs: list[dict[int, Logprob]] | None
    ) -> dict[str, Any] | None:
        if logprobs is None or not self._wants_logprobs:
            return None
        top = self._body.top_logprobs or 0
        content = []
        for token, entry in zip(token_ids, logprobs, strict=False):
            likeliest = sorted(entry.values(), key=lambda p: p.rank)[:top]
            content.append({**_logprob(entry[token]), "top_logprobs": [_logprob(p) for p in likeliest]})
        return {"content": content, "refusal": None}


def _logprob(entry: Logprob) -> dict[str, Any]:
    token = entry.decoded_token
    return {"token": token, "logprob": entry.logprob, "bytes": list(token.encode("utf-8", "replace"))}


# ---- both

Style = CompletionStyle | ChatStyle


def _ask(call: Call, body: SamplingBody, prompt: Any, sampling: dict[str, Any], number: int) -> Ask:
    return Ask(
        prompt,
        sampling,
        stream=bool(body.stream),
        request_id=f"{call.request_id}-{number}" if number else call.request_id,
        priority=body.priority or 0,
        timeout=body.timeout,
    )


def _reply(call: Call, prefix: str, object_: str) -> Reply:
    return Reply(
        f"{prefix}-{call.request_id}", object_, int(time.time()), call.body.model or call.service.config.name
    )


async def _answer(call: Call, body: SamplingBody, asks: list[Ask], style: Style) -> Response:
    events = _events(call, body, asks, style)
    if body.stream:
        return await EventStream.start(events, call.service.config.limits.write_timeout)
    async with contextlib.aclosing(merged([call.service.generate(ask) for ask in asks])) as stream:
        outputs = {number: output async for number, output in stream}
    return JSONResponse(style.whole([outputs[i] for i in range(len(asks))], asks))


async def _events(
    call: Call, body: SamplingBody, asks: list[Ask], style: Style
) -> AsyncGenerator[bytes, None]:
    config = call.service.config
    options = body.stream_options
    with_usage = bool(options and options.include_usage)
    each_usage = bool(options and options.continuous_usage_stats)
    last: dict[int, RequestOutput] = {}
    followers = [Follower() for _ in asks]
    try:
        async with contextlib.aclosing(merged([call.service.generate(ask) for ask in asks])) as stream:
            async for number, output in stream:
                if number not in last:
                    for chunk in style.opening(number):
                        yield sse_event(chunk)
                last[number] = output
                for news in followers[number].news(output):
                    for chunk in style.chunk(number, news, config.full_text):
                        if each_usage or (config.mindie and news.ends):
                            chunk["usage"] = usage(last.values())
                        if config.full_text and news.ends:
                            chunk["full_text"] = news.completion.text
                        yield sse_event(chunk)
    except Fault as fault:
        if not last:  # nothing was sent yet: the fault becomes the answer's status
            raise
        call.notes["fault"] = str(fault)
        yield sse_event(call.shape(fault).body)
    else:
        if with_usage:
            head = style.reply.head("chat.completion.chunk" if isinstance(style, ChatStyle) else None)
            yield sse_event({**head, "choices": [], "usage": usage(last.values())})
    yield DONE


def finish_reason(completion: CompletionOutput) -> str:
    return "length" if completion.finish_reason == "length" else "stop"


def usage(outputs: Iterable[RequestOutput]) -> dict[str, int]:
    found = list(outputs)
    prompt = sum(len(output.prompt_token_ids) for output in found)
    new = sum(len(completion.token_ids) for output in found for completion in output.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


ENDPOINTS = (
    Endpoint("GET", "/v1/models", list_models, "openai", "The models served"),
    Endpoint("GET", "/v1/models/{model}", show_model, "openai", "One of them"),
    Endpoint(
        "POST", "/v1/completions", completions, "openai", "Complete a prompt",
        body=CompletionRequest, answers=STREAMS,
    ),
    Endpoint(
        "POST", "/v1/chat/completions", chat_completions, "openai", "Answer a conversation",
        body=ChatRequest, answers=STREAMS,
    ),
)  # fmt: skip

"""POST /v1/chat/completions, tools included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.responses import Response

from llm_boost.engine.outputs import CompletionOutput, Logprob, RequestOutput
from llm_boost.service.choices import News
from llm_boost.service.endpoint import Call
from llm_boost.service.faults import invalid
from llm_boost.service.openai_answer import Head, answer, ask, check_model, finish_reason, head
from llm_boost.service.openai_models import WHITESPACE, ChatRequest
from llm_boost.service.tools import Found, Parser, parser_for, schema_for


async def chat_completions(call: Call) -> Response:
    body: ChatRequest = call.body
    check_model(call.service, body.model)
    if body.top_logprobs is not None and body.logprobs is False:
        raise invalid(
            "Value error, when using top_logprobs, logprobs must be true or null in chat completions",
            "top_logprobs",
        )
    call.service.check_accepts()
    request = ask(call, [message.for_template() for message in body.messages], _sampling(body))
    request.template_options = _template_options(body)
    template = call.service.backend.tokenizer.chat_template
    style = _Chat(head(call, "chatcmpl", "chat.completion", "chat.completion.chunk"), body, template)
    return await answer(call, [request], style)


def _sampling(body: ChatRequest) -> dict[str, Any]:
    sampling = {
        **body.sampling(),
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "logprobs": (body.top_logprobs or 0) if _wants_logprobs(body) else None,
    }
    schema = schema_for(body.tools or [], body.tool_choice)
    if schema is not None:
        if sampling["structured_outputs"] is not None:
            raise invalid("tool_choice: calls are required, and response_format wants text.", "tool_choice")
        sampling["structured_outputs"] = {"json": schema, "whitespace_pattern": WHITESPACE}
    return sampling


def _wants_logprobs(body: ChatRequest) -> bool:
    return bool(body.logprobs) or body.top_logprobs is not None


def _template_options(body: ChatRequest) -> dict[str, Any]:
    options = dict(body.chat_template_kwargs or {})
    taken = {"chat_template", "messages", "tools", "add_generation_prompt"} & options.keys()
    if body.chat_template is not None or taken:
        name = min(taken, default="chat_template")
        raise invalid(f"{name}: templates of requests are not run; the model's own is.", name)
    if body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    if body.tools and body.tool_choice != "none":
        options["tools"] = [tool.for_template() for tool in body.tools]
    return options


class _Chat:
    """Choices in the form of /v1/chat/completions."""

    def __init__(self, head: Head, body: ChatRequest, template: str | None) -> None:
        self.head, self._body, self._template = head, body, template
        self._uses_tools = bool(body.tools) and body.tool_choice != "none"
        self._parsers: dict[int, Parser] = {}  # of each streamed choice
        self._calls: dict[int, int] = {}  # tool calls of each so far

    def choices(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        return [self._choice(completion) for completion in output.outputs]

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": completion.text}
        ending = finish_reason(completion)
        if self._uses_tools:
            parser = self._parser()
            parts = [parser.push(completion.text), parser.finish()]
            calls = [call for part in parts for call in part.calls]
            message["content"] = "".join(part.content for part in parts) or None
            if calls:
                message["tool_calls"] = [call.as_dict() for call in calls]
                ending = "tool_calls"
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.token_ids, completion.logprobs),
            "finish_reason": ending,
            "stop_reason": completion.stop_reason,
        }

    def opening(self, number: int) -> Iterable[dict[str, Any]]:
        for index in range(self._body.n or 1):
            yield _delta(index, {"role": "assistant", "content": ""})

    def chunk(self, number: int, news: News, full_text: bool) -> Iterable[dict[str, Any]]:
        logprobs = self._logprobs(news.token_ids, news.logprobs or None)
        if self._uses_tools:
            deltas = self._tool_deltas(news)
        else:
            text = news.completion.text if full_text else news.text
            deltas = [{"content": text}] if text else []
        if not deltas and (logprobs or news.ends):
            deltas = [{}]
        for delta in deltas[:-1]:
            yield _delta(news.index, delta)
        for delta in deltas[-1:]:
            choice = _delta(news.index, delta, logprobs)
            if news.ends:
                called = self._calls.get(news.index)
                choice["finish_reason"] = "tool_calls" if called else finish_reason(news.completion)
                choice["stop_reason"] = news.completion.stop_reason
            yield choice

    def _tool_deltas(self, news: News) -> list[dict[str, Any]]:
        parser = self._parsers.setdefault(news.index, self._parser())
        parts: list[Found] = [parser.push(news.text)]
        if news.ends:
            parts.append(parser.finish())
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if part.content:
                deltas.append({"content": part.content})
            for call in part.calls:
                position = self._calls.get(news.index, 0)
                self._calls[news.index] = position + 1
                deltas.append({"tool_calls": [{"index": position, **call.as_dict()}]})
        return deltas

    def _parser(self) -> Parser:
        return parser_for(self._template, self._body.tools or [], self._body.tool_choice)

    def _logprobs(
        self, token_ids: list[int], logprobs: list[dict[int, Logprob]] | None
    ) -> dict[str, Any] | None:
        if logprobs is None or not _wants_logprobs(self._body):
            return None
        top = self._body.top_logprobs or 0
        content = []
        for token, entry in zip(token_ids, logprobs, strict=False):
            likeliest = sorted(entry.values(), key=lambda p: p.rank)[:top]
            content.append({**_logprob(entry[token]), "top_logprobs": [_logprob(p) for p in likeliest]})
        return {"content": content, "refusal": None}


def _delta(index: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _logprob(entry: Logprob) -> dict[str, Any]:
    token = entry.decoded_token
    return {"token": token, "logprob": entry.logprob, "bytes": list(token.encode("utf-8", "replace"))}

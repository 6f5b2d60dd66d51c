"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.responses import Response

from llm_boost.engine.outputs import CompletionOutput, Logprob, RequestOutput
from llm_boost.service.choices import News
from llm_boost.service.endpoint import Call
from llm_boost.service.faults import invalid
from llm_boost.service.openai_answer import Head, answer, ask, check_model, finish_reason, head
from llm_boost.service.openai_models import CompletionRequest
from llm_boost.service.service import default_max_tokens


async def completions(call: Call) -> Response:
    body: CompletionRequest = call.body
    check_model(call.service, body.model)
    if body.echo and body.stream:
        raise invalid("echo is not supported when stream is true.", "echo")
    prompts = _prompts(body)
    call.service.check_accepts(len(prompts))
    sampling = {
        **body.sampling(),
        "max_tokens": body.max_tokens or default_max_tokens(call.service),
        "logprobs": body.logprobs,
    }
    asks = [ask(call, prompt, sampling, number) for number, prompt in enumerate(prompts)]
    return await answer(
        call, asks, _Completions(head(call, "cmpl", "text_completion", "text_completion"), body)
    )


def _prompts(body: CompletionRequest) -> list[Any]:
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise invalid("prompt: got an empty list, allowed at least one prompt.", "prompt")
    return list(prompt)


class _Completions:
    """Choices in the form of /v1/completions."""

    def __init__(self, head: Head, body: CompletionRequest) -> None:
        self.head, self._body, self._n = head, body, body.n or 1
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def choices(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        echo = (output.prompt or "") if self._body.echo else ""
        return [
            {
                "index": number * self._n + completion.index,
                "text": echo + completion.text,
                "logprobs": _logprobs(completion.token_ids, completion.logprobs, len(echo)),
                **_ending(completion),
            }
            for completion in output.outputs
        ]

    def opening(self, number: int) -> Iterable[dict[str, Any]]:
        return ()

    def chunk(self, number: int, news: News, full_text: bool) -> Iterable[dict[str, Any]]:
        index = number * self._n + news.index
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(news.text)
        yield {
            "index": index,
            "text": news.completion.text if full_text else news.text,
            "logprobs": _logprobs(news.token_ids, news.logprobs or None, offset),
            **(_ending(news.completion) if news.ends else {"finish_reason": None, "stop_reason": None}),
        }


def _ending(completion: CompletionOutput) -> dict[str, Any]:
    return {"finish_reason": finish_reason(completion), "stop_reason": completion.stop_reason}


def _logprobs(
    token_ids: list[int], logprobs: list[dict[int, Logprob]] | None, offset: int
) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    chosen = [entry[token] for token, entry in zip(token_ids, logprobs, strict=False)]
    offsets = []
    for entry in chosen:
        offsets.append(offset)
        offset += len(entry.decoded_token)
    return {
        "text_offset": offsets,
        "token_logprobs": [entry.logprob for entry in chosen],
        "tokens": [entry.decoded_token for entry in chosen],
        "top_logprobs": [{p.decoded_token: p.logprob for p in entry.values()} for entry in logprobs],
    }

"""MindIE's own API: /infer, /infer_token and /v1/tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import JSONResponse, Response

from llm_boost.engine.outputs import RequestOutput
from llm_boost.service.body import Body
from llm_boost.service.choices import Follower
from llm_boost.service.endpoint import Call, Endpoint
from llm_boost.service.events import STREAMS, EventStream, sse_event
from llm_boost.service.faults import Fault, invalid
from llm_boost.service.openai_models import TokenIds
from llm_boost.service.service import Ask
from llm_boost.service.tgi_shapes import finish_reason
from llm_boost.service.triton import QueueParameters, StepClock


class NativeRequest(Body):
    inputs: Annotated[str, Field(min_length=1)] | None = None
    input_id: TokenIds | None = None
    stream: bool | None = None
    parameters: QueueParameters | None = None


class TokenizerRequest(Body):
    inputs: str
    do_decode: bool | None = None


async def infer(call: Call) -> Response:
    body: NativeRequest = call.body
    ask = _ask(call)
    if body.stream:
        return await EventStream.start(_events(call, ask), call.service.config.limits.write_timeout)
    output = await call.service.answer(ask)
    return JSONResponse({"generated_text": output.outputs[0].text, "details": _details(call, ask, output)})


def _ask(call: Call) -> Ask:
    body: NativeRequest = call.body
    if body.inputs is not None and body.input_id is not None:
        raise invalid("Input conflict.", "inputs")
    prompt = body.inputs if body.inputs is not None else body.input_id
    if prompt is None:
        raise invalid("Not found inputs.", "inputs")
    given = body.parameters or QueueParameters()
    return given.ask(prompt, stream=bool(body.stream), request_id=call.ask_id)


async def _events(call: Call, ask: Ask) -> AsyncGenerator[bytes, None]:
    follower, clock = Follower(), StepClock()
    full = call.service.config.full_text
    try:
        async with contextlib.aclosing(call.service.generate(ask)) as outputs:
            async for output in outputs:
                for news in follower.news(output):
                    token: dict[str, Any] = {"id": news.token_ids}
                    event: dict[str, Any] = {**clock.step(), "token": token}
                    if news.ends:
                        token["text"] = None
                        event["generated_text"] = news.completion.text
                        event["details"] = _details(call, ask, output)
                    else:
                        token["text"] = news.completion.text if full else news.text
                    yield sse_event(event)
    except Fault as fault:
        if not clock.started:
            raise
        call.notes["fault"] = str(fault)
        yield sse_event(call.shape(fault).body)


def _details(call: Call, ask: Ask, output: RequestOutput) -> dict[str, Any] | None:
    body: NativeRequest = call.body
    if body.parameters is None or not body.parameters.details:
        return None
    completion = output.outputs[0]
    return {
        "finish_reason": finish_reason(completion),
        "generated_tokens": len(completion.token_ids),
        "generated_token_ids": completion.token_ids,
        "seed": ask.sampling["seed"],
    }


async def count_tokens(call: Call) -> Response:
    body: TokenizerRequest = call.body
    tokens = call.service.backend.tokenizer.encode_with_offsets(body.inputs)
    answer: dict[str, Any] = {"token_number": len(tokens)}
    if body.do_decode is not False:
        answer["tokens"] = [token.text for token in tokens]
    return JSONResponse(answer)


ENDPOINTS = (
    Endpoint("POST", "/infer", infer, "native", "Generate", body=NativeRequest, answers=STREAMS),
    Endpoint("POST", "/infer_token", infer, "native", "Generate from tokens", body=NativeRequest,
             answers=STREAMS),
    Endpoint("POST", "/v1/tokenizer", count_tokens, "native", "A text's tokens",
             body=TokenizerRequest),
)  # fmt: skip

"""vLLM's first API, as MindIE serves it: POST /generate with a `prompt`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from pydantic import Field
from pydantic_core import to_json
from starlette.responses import JSONResponse, Response

from llm_boost.service.body import Says
from llm_boost.service.choices import Follower
from llm_boost.service.endpoint import Call
from llm_boost.service.events import EventStream
from llm_boost.service.faults import Fault
from llm_boost.service.openai_models import SamplingBody
from llm_boost.service.service import Ask, default_max_tokens


class VllmRequest(SamplingBody):
    prompt: Annotated[
        str,
        Field(min_length=1),
        Says(
            "Prompt must be necessary and data type must be string and length in (0, 41943040], "
            "but the length of inputs is 0"
        ),
    ]


async def generate_vllm(call: Call) -> Response:
    body: VllmRequest = call.body
    if body.model is not None and body.model not in call.service.config.served_names:
        raise Fault("not_found", f"Model not found: got {body.model!r}", param="model")
    ask = Ask(
        body.prompt,
        {**body.sampling(), "max_tokens": body.max_tokens or default_max_tokens(call.service)},
        stream=bool(body.stream),
        request_id=call.ask_id,
        priority=body.priority or 0,
        timeout=body.timeout,
    )
    if body.stream:
        limits = call.service.config.limits
        return await EventStream.start(_chunks(call, ask), limits.write_timeout, "text/plain")
    output = await call.service.answer(ask)
    return JSONResponse({"text": [f"{body.prompt} {completion.text}" for completion in output.outputs]})


async def _chunks(call: Call, ask: Ask) -> AsyncGenerator[bytes, None]:
    r"""JSON objects, each followed by a `\0`: the new text of each completion."""
    follower, started = Follower(), False
    full = call.service.config.full_text
    try:
        async with contextlib.aclosing(call.service.generate(ask)) as outputs:
            async for output in outputs:
                news = {entry.index: entry for entry in follower.news(output)}
                if news:
                    texts = [
                        completion.text if full else news[i].text if i in news else ""
                        for i, completion in enumerate(output.outputs)
                    ]
                    yield _chunk({"text": texts})
                    started = True
    except Fault as fault:
        if not started:
            raise
        call.notes["fault"] = str(fault)
        yield _chunk(call.shape(fault).body)


def _chunk(value: dict[str, Any]) -> bytes:
    return to_json(value) + b"\0"

"""text-generation-inference's API, in MindIE's shapes or (`--tgi-shapes strict`) in its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import JSONResponse, Response

from llm_boost.service.choices import Follower
from llm_boost.service.endpoint import Call, Endpoint
from llm_boost.service.events import SSE, STREAMS, EventStream, sse_event
from llm_boost.service.faults import Fault, invalid
from llm_boost.service.mindie_models import DEFAULT_NEW_TOKENS
from llm_boost.service.service import Ask
from llm_boost.service.tgi_models import TgiParameters, TgiRequest, TokenizeRequest, parse_generate
from llm_boost.service.tgi_shapes import Shapes
from llm_boost.service.vllm_api import VllmRequest, generate_vllm

_STRICT_NEW_TOKENS = 1024  # of TGI 3 when a request names none


async def root(call: Call) -> Response:
    if call.body.stream:
        return await _stream(call)
    return JSONResponse([await _whole(call)])


async def generate(call: Call) -> Response:
    if isinstance(call.body, VllmRequest):
        return await generate_vllm(call)
    return JSONResponse(await _whole(call))


async def generate_stream(call: Call) -> Response:
    return await _stream(call)


async def tokenize(call: Call) -> Response:
    body: TokenizeRequest = call.body
    tokenizer = call.service.backend.tokenizer
    special = body.add_special_tokens is not False
    tokens = tokenizer.encode_with_offsets(body.inputs, add_special_tokens=special)
    return JSONResponse([{"id": t.id, "text": t.text, "start": t.start, "stop": t.stop} for t in tokens])


async def info(call: Call) -> Response:
    service = call.service
    config, model = service.config, service.backend.model
    longest_input = config.max_input_tokens or model.max_model_len - 1
    if config.tgi_shapes == "strict":
        return JSONResponse(
            {
                "model_id": config.name, "model_sha": None, "model_pipeline_tag": "text-generation",
                "model_dtype": model.dtype, "model_device_type": "cpu",
                "max_concurrent_requests": config.limits.max_running, "max_best_of": 1,
                "max_stop_sequences": 64, "max_input_tokens": longest_input,
                "max_total_tokens": model.max_model_len, "validation_workers": 1,
                "max_client_batch_size": 1, "router": "llm-boost", "version": _version(), "sha": None,
                "docker_label": None,
            }
        )  # fmt: skip
    return JSONResponse(
        {
            "docker_label": None,
            "max_batch_total_tokens": model.max_num_batched_tokens,
            "max_best_of": 1,
            "max_concurrent_requests": model.max_num_seqs,
            "max_stop_sequences": None,
            "max_waiting_tokens": None,
            "sha": None,
            "validation_workers": None,
            "version": _version(),
            "waiting_served_ratio": None,
            "models": [
                {
                    "model_device_type": "cpu",
                    "model_dtype": model.dtype,
                    "model_id": config.name,
                    "model_pipeline_tag": "text-generation",
                    "model_sha": None,
                    "max_total_tokens": model.max_model_len,
                }
            ],
            "max_input_length": longest_input,
        }
    )


def _version() -> str:
    from llm_boost import __version__

    return __version__


def _ask(call: Call, *, stream: bool) -> Ask:
    body: TgiRequest = call.body
    given = body.parameters or TgiParameters()
    strict = call.service.config.tgi_shapes == "strict"
    if given.adapter_id is not None:
        raise Fault(
            "not_found",
            f"adapter_id: got {given.adapter_id!r}; this engine has no adapters",
            param="adapter_id",
        )
    if (given.best_of or 1) > 1:
        raise invalid("`best_of` > 1 is not supported by this engine.", "best_of")
    if stream and given.decoder_input_details:
        raise invalid(
            "The decoder_input_details must not be true when stream is true.", "decoder_input_details"
        )
    sampling = given.sampling(_STRICT_NEW_TOKENS if strict else DEFAULT_NEW_TOKENS)
    sampling |= {"stop": given.stop, "frequency_penalty": given.frequency_penalty}
    sampling["structured_outputs"] = None if given.grammar is None else given.grammar.structure()
    if strict and (stream or given.details or given.decoder_input_details or given.top_n_tokens):
        sampling["logprobs"] = given.top_n_tokens or 0
    return Ask(body.inputs, sampling, stream=stream, request_id=call.ask_id, keep_last=given.truncate)


async def _whole(call: Call) -> dict[str, Any]:
    body: TgiRequest = call.body
    given = body.parameters or TgiParameters()
    ask = _ask(call, stream=False)
    output = await call.service.answer(ask)
    shapes = Shapes(call, ask, given)
    completion = output.outputs[0]
    answer: dict[str, Any] = {"generated_text": shapes.full(body.inputs, completion.text)}
    if given.details or given.decoder_input_details:
        return {"details": shapes.details(output), **answer}
    return answer


async def _stream(call: Call) -> Response:
    return await EventStream.start(_events(call), call.service.config.limits.write_timeout)


async def _events(call: Call) -> AsyncGenerator[bytes, None]:
    body: TgiRequest = call.body
    given = body.parameters or TgiParameters()
    ask = _ask(call, stream=True)
    shapes = Shapes(call, ask, given)
    follower = Follower()
    started = False
    try:
        async with contextlib.aclosing(call.service.generate(ask)) as outputs:
            async for output in outputs:
                for news in follower.news(output):
                    for event in shapes.events(output, news, body.inputs):
                        yield sse_event(event)
                        started = True
    except Fault as fault:
        if not started:
            raise
        call.notes["fault"] = str(fault)
        yield sse_event(call.shape(fault).body)


ENDPOINTS = (
    Endpoint("POST", "/", root, "tgi", "Generate; `stream` chooses how", body=TgiRequest, answers=STREAMS),
    Endpoint("POST", "/generate", generate, "tgi", "Generate (TGI's body, or vLLM's)",
             parse=parse_generate, body=TgiRequest,
             or_body=VllmRequest, answers=(*STREAMS, "text/plain")),
    Endpoint("POST", "/generate_stream", generate_stream, "tgi", "Generate, token by token",
             body=TgiRequest, answers=(SSE,)),
    Endpoint("POST", "/tokenize", tokenize, "tgi", "A text's tokens", body=TokenizeRequest),
    Endpoint("GET", "/info", info, "tgi", "The model and its limits", also=("management",)),
)  # fmt: skip

"""Triton's (KServe v2) API as MindIE serves it: text and token inference, stop, metadata."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from pydantic import Field
from pydantic_core import to_json
from starlette.responses import JSONResponse, Response

from llm_boost.engine.outputs import RequestOutput
from llm_boost.service.body import Body, Says
from llm_boost.service.choices import Follower
from llm_boost.service.endpoint import Call, Endpoint
from llm_boost.service.events import SSE, EventStream
from llm_boost.service.faults import Fault, invalid
from llm_boost.service.mindie_models import GenerationParameters
from llm_boost.service.service import Ask
from llm_boost.service.tgi_shapes import finish_reason

MAX_TOKENS = 1_048_576
LOWEST_PRIORITY = 5  # and the default; 1 comes first

RequestId = Annotated[
    str,
    Field(pattern=r"^[a-zA-Z0-9_-]{1,256}$"),
    Says("Request id must be 1 to 256 of [a-zA-Z0-9_-], got {}."),
]
TopK = Annotated[int, Field(ge=0, le=2**31 - 1), Says("Parameter top_k must be in [0,2147483647], got {}.")]
TopP = Annotated[float, Field(gt=0, le=1), Says("Parameter top_p must be in (0.0,1.0], got {}.")]
Priority = Annotated[int, Field(ge=1, le=5), Says("Parameter priority must be in [1,5], got {}.")]
Timeout = Annotated[
    int,
    Field(ge=1, le=65535),
    Says("Parameter timeout must be strictly positive and small than 65535 seconds, got {}."),
]


class QueueParameters(GenerationParameters):
    """What Triton's and the native endpoints add: a request's place in the queue."""

    priority: Priority | None = None
    timeout: Timeout | None = None

    def ask(self, prompt: str | list[int], *, stream: bool, request_id: str) -> Ask:
        return Ask(
            prompt,
            self.sampling(),
            stream=stream,
            request_id=request_id,
            priority=(self.priority or LOWEST_PRIORITY) - LOWEST_PRIORITY,
            timeout=self.timeout,
        )


class TritonParameters(QueueParameters):
    top_k: TopK | None = None
    top_p: TopP | None = None
    batch_size: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None  # MindIE takes it as a hint


class GenerateRequest(Body):
    id: RequestId | None = None
    text_input: Annotated[str, Field(min_length=1)]
    parameters: TritonParameters | None = None


class InferInput(Body):
    name: str
    shape: Annotated[list[int], Field(max_length=8)]
    datatype: str
    data: list[Any]
    parameters: TritonParameters | None = None


class InferOutput(Body):
    name: str


class InferRequest(Body):
    id: RequestId | None = None
    inputs: Annotated[list[InferInput], Field(max_length=16)]
    outputs: Annotated[list[InferOutput], Field(max_length=16)] | None = None
    parameters: TritonParameters | None = None


class StopRequest(Body):
    id: RequestId


async def generate(call: Call) -> Response:
    check_model(call)
    body: GenerateRequest = call.body
    given, name = body.parameters or TritonParameters(), body.id or call.ask_id
    output = await call.service.answer(given.ask(body.text_input, stream=False, request_id=name))
    answer = {**_head(call, name), "text_output": output.outputs[0].text}
    if given.details:
        answer["details"] = _details(output)
    return JSONResponse(answer)


async def generate_stream(call: Call) -> Response:
    check_model(call)
    return await EventStream.start(_events(call), call.service.config.limits.write_timeout)


async def _events(call: Call) -> AsyncGenerator[bytes, None]:
    body: GenerateRequest = call.body
    given, name = body.parameters or TritonParameters(), body.id or call.ask_id
    follower, clock = Follower(), StepClock()
    try:
        ask = given.ask(body.text_input, stream=True, request_id=name)
        async with contextlib.aclosing(call.service.generate(ask)) as outputs:
            async for output in outputs:
                for news in follower.news(output):
                    full = call.service.config.full_text
                    event = {
                        **_head(call, name),
                        "text_output": news.completion.text if full else news.text,
                        **clock.step(),
                    }
                    if given.details and news.ends:
                        event["details"] = _details(output)
                    yield _event(event)
    except Fault as fault:
        if not clock.started:
            raise
        call.notes["fault"] = str(fault)
        yield _event(call.shape(fault).body)


def _event(value: dict[str, Any]) -> bytes:
    return b"data:" + to_json(value) + b"\n\n"


class StepClock:
    """Milliseconds of the prefill, then of each token."""

    def __init__(self) -> None:
        self._then = time.monotonic()
        self.started = False

    def step(self) -> dict[str, float | None]:
        now = time.monotonic()
        took, self._then = round(1000 * (now - self._then), 3), now
        first, self.started = not self.started, True
        return {"prefill_time": took if first else None, "decode_time": None if first else took}


def _head(call: Call, name: str) -> dict[str, Any]:
    return {"id": name, "model_name": call.path("model"), "model_version": None}


def _details(output: RequestOutput) -> dict[str, Any]:
    completion, metrics = output.outputs[0], output.metrics
    first, last = metrics.time_to_first_token, metrics.last_token_time
    decode = None if first is None or last is None else last - metrics.arrival_time - first
    return {
        "finish_reason": finish_reason(completion),
        "generated_tokens": len(completion.token_ids),
        "first_token_cost": None if first is None else round(1000 * first, 3),
        "decode_cost": None if decode is None else round(1000 * decode, 3),
    }


async def infer(call: Call) -> Response:
    check_model(call)
    body: InferRequest = call.body
    tokens = _input_tokens(body)
    given = body.parameters or body.inputs[0].parameters or TritonParameters()
    name = body.id or call.ask_id
    output = await call.service.answer(given.ask(tokens, stream=False, request_id=name))
    made = output.outputs[0].token_ids
    named = body.outputs[0].name if body.outputs else "output0"
    answer = {"name": named, "shape": [1, len(made)], "datatype": "UINT32", "data": made}
    return JSONResponse({"id": name, "model_name": call.path("model"), "outputs": [answer]})


def _input_tokens(body: InferRequest) -> list[int]:
    if len(body.inputs) != 1:
        raise invalid("Inputs count must be 1.", "inputs")
    given = body.inputs[0]
    if given.datatype != "UINT32":
        raise invalid(f"Unsupported datatype, got {given.datatype[:40]}.", "inputs[0].datatype")
    if (
        len(given.shape) not in (1, 2)
        or not 0 < given.shape[-1] <= MAX_TOKENS
        or given.shape[0]
        not in (
            1,
            given.shape[-1],
        )
    ):
        raise invalid(
            "Shape must be at most two-dimensional, and the last element's value must be in (0,1048576].",
            "inputs[0].shape",
        )
    data = given.data[0] if len(given.data) == 1 and isinstance(given.data[0], list) else given.data
    if len(data) != given.shape[-1]:
        raise invalid(f"Data size should be {given.shape[-1]}, got {len(data)}.", "inputs[0].data")
    if body.outputs is not None and len(body.outputs) != 1:
        raise invalid(f"Outputs size should be 1, got {len(body.outputs)}.", "outputs")
    return list(data)


async def stop_infer(call: Call) -> Response:
    check_model(call)
    body: StopRequest = call.body
    if not await call.service.abort(body.id):
        raise Fault("not_found", f"RequestId is {body.id} not found.")
    return JSONResponse({"id": body.id})


async def server_metadata(call: Call) -> Response:
    from llm_boost import __version__

    config = call.service.config
    schedule = config.mindie.schedule if config.mindie else None
    extensions = {
        "max_iter_times": config.max_output_tokens,
        "prefill_policy_type": schedule.prefillPolicyType if schedule else 0,
        "decode_policy_type": schedule.decodePolicyType if schedule else 0,
        "max_prefill_batch_size": schedule.maxPrefillBatchSize if schedule else None,
        "max_prefill_tokens": schedule.maxPrefillTokens if schedule else None,
    }
    return JSONResponse({"name": "MindIE Server", "version": __version__, "extensions": extensions})


async def model_metadata(call: Call) -> Response:
    check_model(call)
    return JSONResponse(
        {
            "name": call.path("model"),
            "versions": ["1"],
            "platform": "MindIE Server",
            "inputs": [{"name": "input0", "shape": [-1], "datatype": "UINT32"}],
            "outputs": [{"name": "output0", "shape": [-1], "datatype": "UINT32"}],
        }
    )


async def model_config(call: Call) -> Response:
    check_model(call)
    config, model = call.service.config, call.service.backend.model
    entry = config.mindie.model if config.mindie else None
    return JSONResponse(
        {
            "model_name": call.path("model"),
            "max_seq_len": model.max_model_len,
            "npu_mem_size": entry.npuMemSize if entry else -1,
            "cpu_mem_size": entry.cpuMemSize if entry else 0,
            "world_size": entry.worldSize if entry else 1,
            "input_datatype": "UINT32",
            "output_datatype": "UINT32",
            "model_weight_path": (config.model or "").rstrip("/").rpartition("/")[2],
            "model_instance_type": "Standard",
        }
    )


def check_model(call: Call) -> None:
    name = call.path("model")
    if name not in call.service.config.served_names:
        raise Fault("not_found", f"Model {name} not found.")


_MODEL = "/v2/models/{model}"
ENDPOINTS = (
    Endpoint("POST", _MODEL + "/generate", generate, "triton", "Generate", body=GenerateRequest),
    Endpoint("POST", _MODEL + "/generate_stream", generate_stream, "triton",
             "Generate, token by token", body=GenerateRequest, answers=(SSE,)),
    Endpoint("POST", _MODEL + "/infer", infer, "triton", "From tokens to tokens", body=InferRequest),
    Endpoint("POST", _MODEL + "/stopInfer", stop_infer, "triton", "End a request", body=StopRequest),
    Endpoint("GET", "/v2", server_metadata, "triton", "The server"),
    Endpoint("GET", _MODEL, model_metadata, "triton", "The model's inputs and outputs"),
    Endpoint("GET", _MODEL + "/config", model_config, "triton", "The model's limits"),
)  # fmt: skip

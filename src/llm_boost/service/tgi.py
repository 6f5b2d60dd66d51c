"""text-generation-inference's API, in MindIE's shapes or (`--tgi-shapes strict`) in its own."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.responses import JSONResponse, Response

from llm_boost.engine.outputs import CompletionOutput, RequestOutput
from llm_boost.service.body import Says, as_model
from llm_boost.service.choices import Follower, News
from llm_boost.service.endpoint import Call, Endpoint
from llm_boost.service.events import EventStream
from llm_boost.service.faults import Fault, invalid
from llm_boost.service.openai_models import Body, StopStrings
from llm_boost.service.service import Ask
from llm_boost.service.vllm_api import VllmRequest, generate_vllm

FLT_MAX = 3.4028234663852886e38
DEFAULT_NEW_TOKENS = {"mindie": 20, "strict": 1024}
_STOP_SAYS = (
    "Input validation error: `stop` must be list[string] if list, and item length in [1, 1024] "
    "with total <= 32768"
)

# Parameters that MindIE's TGI, Triton and native endpoints share.
Temperature = Annotated[
    float, Field(gt=0, le=FLT_MAX), Says(f"Parameter temperature must be in (0.0,{FLT_MAX:g}], got {{}}.")
]
TopK = Annotated[int, Field(ge=1, le=2**31 - 1), Says("Parameter top_k must be in (0,2147483647], got {}.")]
TopP = Annotated[float, Field(gt=0, lt=1), Says("Parameter top_p must be in (0.0,1.0), got {}.")]
TypicalP = Annotated[float, Field(gt=0, le=1), Says("Parameter typical_p must be in (0.0,1.0], got {}.")]
Repetition = Annotated[
    float,
    Field(gt=0, le=FLT_MAX),
    Says(f"Parameter 'repetition_penalty' must be in (0.0, {FLT_MAX:g}], got {{}}."),
]
Seed = Annotated[
    int, Field(ge=0, le=2**63 - 1), Says("Parameter seed must be in [0, 9223372036854775807], got {}.")
]
NewTokens = Annotated[
    int,
    Field(ge=1, le=2**31 - 1),
    Says("Parameter max_new_tokens must be in (0,2147483647], got {}."),
]
Inputs = Annotated[str, Field(min_length=1), Says("Inputs length must be in (0, 41943040], but got 0")]


class GenerationParameters(Body):
    """What TGI's, Triton's and the native endpoints know of sampling."""

    details: bool | None = None
    do_sample: bool | None = None
    max_new_tokens: NewTokens | None = None
    repetition_penalty: Repetition | None = None
    seed: Seed | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    typical_p: TypicalP | None = None
    watermark: bool | None = None

    def sampling(self, default_new_tokens: int) -> dict[str, Any]:
        """In SamplingParams' names; a value of sampling turns it on unless do_sample says otherwise."""
        if self.typical_p not in (None, 1.0):
            raise invalid(
                "typical_p is not supported by this engine: leave it out, or send 1.0.", "typical_p"
            )
        if self.watermark:
            raise invalid("watermark is not supported by this engine: leave it out.", "watermark")
        asked = any(value is not None for value in (self.temperature, self.top_k, self.top_p))
        temperature: float | None = self.temperature
        if self.do_sample is False:
            temperature = 0.0
        elif self.do_sample or asked:
            temperature = 1.0 if self.temperature is None else self.temperature
        return {
            "temperature": None if temperature is None else min(temperature, 100.0),
            "top_k": self.top_k,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": self.max_new_tokens or default_new_tokens,
            "seed": self.seed if self.seed is not None else secrets.randbits(63),
        }


class TgiParameters(GenerationParameters):
    adapter_id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_./-]{1,256}$")] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    decoder_input_details: bool | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    return_full_text: bool | None = None
    stop: Annotated[StopStrings, Says(_STOP_SAYS)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=5)] | None = None
    truncate: (
        Annotated[int, Field(ge=1, le=2**31 - 1), Says("truncate must be in (0,2147483647], got {}.")] | None
    ) = None


class TgiRequest(Body):
    inputs: Inputs
    parameters: TgiParameters | None = None
    stream: bool | None = None


class TokenizeRequest(Body):
    inputs: Inputs
    add_special_tokens: bool | None = None


def parse_generate(value: Any) -> TgiRequest | VllmRequest:
    """`prompt` makes it vLLM's, else `inputs` TGI's."""
    fields = value if isinstance(value, dict) else {}
    if fields.get("prompt") is not None:
        return as_model(VllmRequest, value)
    if fields.get("inputs") is not None:
        return as_model(TgiRequest, value)
    raise invalid(
        "`inputs` or `prompt` must be necessary and data type must be string. "
        "Additionally, the request body must be valid json",
        "inputs",
    )


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
    sampling = given.sampling(DEFAULT_NEW_TOKENS[call.service.config.tgi_shapes])
    sampling |= {"stop": given.stop, "frequency_penalty": given.frequency_penalty}
    if strict and (stream or given.details or given.decoder_input_details or given.top_n_tokens):
        sampling["logprobs"] = given.top_n_tokens or 0
    return Ask(body.inputs, sampling, stream=stream, request_id=call.request_id, keep_last=given.truncate)


async def _whole(call: Call) -> dict[str, Any]:
    body: TgiRequest = call.body
    given = body.parameters or TgiParameters()
    ask = _ask(call, stream=False)
    output = await call.service.answer(ask)
    shapes = _Shapes(call, ask, given)
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
    shapes = _Shapes(call, ask, given)
    follower = Follower()
    started = False
    try:
        async with contextlib.aclosing(call.service.generate(ask)) as outputs:
            async for output in outputs:
                for news in follower.news(output):
                    for event in shapes.events(output, news, body.inputs):
                        yield _event(event)
                        started = True
    except Fault as fault:
        if not started:
            raise
        call.notes["fault"] = str(fault)
        yield _event(call.shape(fault).body)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class _Shapes:
    """What differs between TGI and MindIE: a list of ids, null for logprobs, and what details hold."""

    def __init__(self, call: Call, ask: Ask, given: TgiParameters) -> None:
        self._strict = call.service.config.tgi_shapes == "strict"
        self._full_text = call.service.config.full_text
        self._tokenizer = call.service.backend.tokenizer
        self._seed, self._given = ask.sampling["seed"], given
        self._index = 0

    def full(self, inputs: str, text: str) -> str:
        if not self._given.return_full_text:
            return text
        return inputs + text if self._strict else f"{inputs} {text}"

    def details(self, output: RequestOutput) -> dict[str, Any]:
        completion = output.outputs[0]
        prefill = []
        if self._given.decoder_input_details:
            prefill = [self._prefill_token(token) for token in output.prompt_token_ids]
        return {
            **({} if self._strict else {"prompt_tokens": len(output.prompt_token_ids)}),
            "finish_reason": finish_reason(completion),
            "generated_tokens": len(completion.token_ids),
            "prefill": prefill,
            "seed": self._seed,
            "tokens": [self._token(completion, i) for i in range(len(completion.token_ids))],
            **self._top_tokens(completion),
        }

    def events(self, output: RequestOutput, news: News, inputs: str) -> list[dict[str, Any]]:
        completion = news.completion
        ending: dict[str, Any] = {"generated_text": None, "details": None}
        if news.ends:
            ending["generated_text"] = self.full(inputs, completion.text)
            if self._strict or self._given.details:
                ending["details"] = self._ending_details(output)
        if not self._strict:
            text = completion.text if self._full_text else news.text
            return [
                {"token": {"id": news.token_ids, "text": text, "logprob": None, "special": None}, **ending}
            ]
        return self._strict_events(news, ending)

    def _strict_events(self, news: News, ending: dict[str, Any]) -> list[dict[str, Any]]:
        """One token an event; the text goes with the last of those that came together."""
        completion = news.completion
        first = len(completion.token_ids) - len(news.token_ids)
        events = []
        for position in range(first, len(completion.token_ids)):
            self._index += 1
            is_last = position == len(completion.token_ids) - 1
            token = {**self._token(completion, position), "text": news.text if is_last else ""}
            events.append(
                {
                    "index": self._index,
                    "token": token,
                    **self._top_tokens(completion, position),
                    **(ending if is_last else {"generated_text": None, "details": None}),
                }
            )
        return events

    def _ending_details(self, output: RequestOutput) -> dict[str, Any]:
        completion, size = output.outputs[0], len(output.prompt_token_ids)
        return {
            ("input_length" if self._strict else "prompt_tokens"): size,
            "finish_reason": finish_reason(completion),
            "generated_tokens": len(completion.token_ids),
            "seed": self._seed,
        }

    def _prefill_token(self, token: int) -> dict[str, Any]:
        if not self._strict:
            return {"id": token, "logprob": None, "special": None, "text": None}
        return {"id": token, "text": self._text(token), "logprob": None}

    def _token(self, completion: CompletionOutput, position: int) -> dict[str, Any]:
        token = completion.token_ids[position]
        if not self._strict:
            return {"id": token, "logprob": None, "special": None, "text": None}
        entry = completion.logprobs[position] if completion.logprobs else {}
        logprob = entry[token].logprob if token in entry else 0.0
        return {
            "id": token,
            "text": self._text(token),
            "logprob": logprob,
            "special": self._tokenizer.decode([token]) == "" != self._text(token),
        }

    def _top_tokens(self, completion: CompletionOutput, position: int | None = None) -> dict[str, Any]:
        if not self._strict or not self._given.top_n_tokens or not completion.logprobs:
            return {"top_tokens": []} if self._strict and position is not None else {}
        entries = completion.logprobs if position is None else completion.logprobs[position : position + 1]
        count = self._given.top_n_tokens
        tops = [
            [
                {"id": token, "text": p.decoded_token, "logprob": p.logprob, "special": False}
                for token, p in sorted(entry.items(), key=lambda item: item[1].rank)[:count]
            ]
            for entry in entries
        ]
        return {"top_tokens": tops if position is None else tops[0]}

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)


def finish_reason(completion: CompletionOutput) -> Literal["eos_token", "stop_sequence", "length"]:
    """TGI's names, which MindIE's other endpoints use too."""
    if completion.finish_reason == "length":
        return "length"
    if completion.finish_reason == "stop" and completion.stop_reason is None:
        return "eos_token"
    return "stop_sequence"


ENDPOINTS = (
    Endpoint("POST", "/", root, "business", "tgi", "Generate; `stream` chooses how", body=TgiRequest,
             streams=True),
    Endpoint("POST", "/generate", generate, "business", "tgi", "Generate (TGI's body, or vLLM's)",
             parse=parse_generate, body=TgiRequest, streams=True),
    Endpoint("POST", "/generate_stream", generate_stream, "business", "tgi", "Generate, token by token",
             body=TgiRequest, streams=True),
    Endpoint("POST", "/tokenize", tokenize, "business", "tgi", "A text's tokens", body=TokenizeRequest),
    Endpoint("GET", "/info", info, "business", "tgi", "The model and its limits", also=("management",)),
)  # fmt: skip

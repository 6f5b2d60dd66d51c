"""OpenAI's requests as pydantic models, with vLLM's and MindIE's additions."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field

from llm_boost.service.body import Body, Says
from llm_boost.service.faults import invalid
from llm_boost.service.tools import ToolChoice, Tools

Model = Annotated[str, Field(max_length=256)]
Temperature = Annotated[
    float, Field(ge=0, le=100), Says("Parameter temperature must be in [0.0,100.0], got {}.")
]
TopP = Annotated[float, Field(gt=0, le=1), Says("Parameter top_p must be in (0.0,1.0], got {}.")]
TopK = Annotated[
    int, Field(ge=-1, le=2**31 - 1), Says("Parameter top_k must be in -1 || (0,2147483647], got {}")
]
Repetition = Annotated[
    float, Field(gt=0, le=2), Says("Parameter 'repetition_penalty' must be in (0.0, 2.0], got {}.")
]
Presence = Annotated[
    float, Field(ge=-2, le=2), Says("Parameter presence_penalty not in [-2.0, 2.0], but got {}.")
]
Frequency = Annotated[
    float, Field(ge=-2, le=2), Says("Parameter frequency_penalty should be in [-2.0, 2.0], got {}.")
]
Seed = Annotated[
    int, Field(ge=0, le=2**63 - 1), Says("Parameter seed must be in [0, 9223372036854775807], got {}.")
]
MaxTokens = Annotated[
    int, Field(ge=1, le=2**31 - 1), Says("Parameter max_tokens must be (0,2147483647], got {}")
]
Count = Annotated[int, Field(ge=1, le=8192)]
BestOf = Annotated[int, Field(ge=1, le=128), Says("Parameter [best_of] should be in [1, 128], got {}.")]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
StopStrings = StopString | Annotated[list[StopString], Field(max_length=64)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(max_length=1 << 20)]
LogitBias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
Priority = Annotated[int, Field(ge=-(2**31) + 1, le=2**31 - 1)]


# Between the parts of JSON: enough for a space or an indented line, not for a model that goes on for ever.
WHITESPACE = r"\n? {0,8}"


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Body):
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Annotated[
        Literal["text", "json_object", "json_schema"],
        Says("Parameter response_format type must be text, json_object or json_schema, got {}."),
    ]
    json_schema: JsonSchema | None = None


class SamplingBody(Body):
    """What both endpoints know of sampling."""

    model: Model | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Count | None = None
    stop: StopStrings | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] | None = None
    presence_penalty: Presence | None = None
    frequency_penalty: Frequency | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    max_tokens: MaxTokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Priority | None = None
    timeout: Annotated[float, Field(ge=1, le=65535)] | None = None
    best_of: BestOf | None = None
    use_beam_search: bool | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Annotated[dict[str, Any], Field(max_length=16)] | None = None

    def structure(self) -> dict[str, Any] | None:
        """What the text must look like, in the names of StructuredOutputsParams."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return self.structured_outputs
        if self.structured_outputs is not None:
            raise invalid("response_format and structured_outputs: give one of them.", "response_format")
        if wanted.type == "json_object":
            return {"json_object": True, "whitespace_pattern": WHITESPACE}
        if wanted.json_schema is None:
            raise invalid("Parameter response_format: json_schema is missing.", "response_format.json_schema")
        return {"json": wanted.json_schema.schema_, "whitespace_pattern": WHITESPACE}

    def sampling(self) -> dict[str, Any]:
        """In SamplingParams' names."""
        if self.use_beam_search:
            raise invalid("use_beam_search: beam search is not offered over HTTP.", "use_beam_search")
        if self.stream and self.best_of not in (None, self.n or 1):
            raise invalid(f"best_of: got {self.best_of}, allowed in a stream: n ({self.n or 1})", "best_of")
        bias = self.logit_bias
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "n": self.n,
            "best_of": None if self.best_of == (self.n or 1) else self.best_of,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": None if bias is None else {_token_id(key): value for key, value in bias.items()},
            "seed": self.seed,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "structured_outputs": self.structure(),
        }


def _token_id(key: str) -> int | str:
    return int(key) if key.isdecimal() and len(key) < 12 else key


class CompletionRequest(SamplingBody):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=128)]
        | Annotated[list[TokenIds], Field(max_length=128)]
    )
    echo: bool | None = None
    logprobs: (
        Annotated[int, Field(ge=0, le=20), Says("logprobs should be in range [0, 20], got {}.")] | None
    ) = None
    suffix: Literal[""] | None = None


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments as JSON themselves."""
        call: dict[str, Any] = self.model_dump(exclude_none=True)
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON stays text
            call["function"]["arguments"] = json.loads(self.function.arguments)
        return call


class ContentPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        Says("Request param contains role must be system, assistant, user or tool"),
    ]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates know messages: the content one text, the arguments of calls an object."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",
        }
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class ChatRequest(SamplingBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: (
        Annotated[int, Field(ge=0, le=20), Says("Parameter top logprobs must be in [0, 20], got {}.")] | None
    ) = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template: str | None = None  # refused: nothing from a request is run
    add_generation_prompt: bool | None = None

"""TGI's requests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llm_boost.service.body import Body, Says, as_model
from llm_boost.service.faults import invalid
from llm_boost.service.mindie_models import GenerationParameters, Inputs
from llm_boost.service.openai_models import StopStrings
from llm_boost.service.vllm_api import VllmRequest

_STOP_SAYS = (
    "Input validation error: `stop` must be list[string] if list, and item length in [1, 1024] "
    "with total <= 32768"
)


class Grammar(Body):
    """TGI's rule for the text: a JSON schema (as object or text), or a regular expression."""

    type: Literal["json", "regex", "json_schema"]
    value: str | dict[str, Any]

    def structure(self) -> dict[str, Any]:
        """In the names of StructuredOutputsParams."""
        if self.type == "regex":
            return {"regex": self.value}
        value: Any = self.value
        if self.type == "json_schema" and isinstance(value, dict):
            value = value.get("schema", value)
        return {"json": value}


class TgiParameters(GenerationParameters):
    adapter_id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_./-]{1,256}$")] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    decoder_input_details: bool | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    grammar: Grammar | None = None
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

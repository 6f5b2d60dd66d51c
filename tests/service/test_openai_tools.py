"""Tools and structured output, through the `openai` package."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from live_service import Live, Serve
from pydantic import BaseModel
from scripted_backend import ScriptedBackend

MESSAGES: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def client_of(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("text", ["", "I look it up. "])
def test_a_call_that_the_model_writes(serve: Serve, text: str) -> None:
    """On a backend of another kind, too: all that the service knows of it is the protocol."""
    backend = ScriptedBackend(text + CALL)
    client = client_of(serve(load=lambda progress: backend))
    how: dict[str, Any] = {"model": "qwen2", "messages": MESSAGES, "tools": TOOLS}
    choice = client.chat.completions.create(**how).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content or "").strip() == text.strip()
    (call,) = choice.message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    _, options = backend.prompts[0]
    assert options["tools"] == TOOLS

    content, arguments, names, reasons = "", "", [], []
    for chunk in client.chat.completions.create(stream=True, **how):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for part in delta.tool_calls or ():
            names.append(part.function.name)
            arguments += part.function.arguments
        reasons.append(chunk.choices[0].finish_reason)
    assert (content.strip(), names, json.loads(arguments)) == (text.strip(), ["weather"], {"city": "Paris"})
    assert reasons[-1] == "tool_calls"

    plain = client.chat.completions.create(tool_choice="none", **how).choices[0]
    assert plain.message.content == text + CALL
    assert "tools" not in backend.prompts[-1][1]


def test_calls_and_results_in_the_conversation(serve: Serve) -> None:
    backend = ScriptedBackend("It is sunny.")
    client = client_of(serve(load=lambda progress: backend))
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    answer = client.chat.completions.create(model="qwen2", messages=messages, tools=TOOLS)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("It is sunny.", "stop")
    seen, _ = backend.prompts[0]
    assert seen[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be(live: Live, choice: Any) -> None:
    """A random model, held to it by the grammar."""
    client = client_of(live)
    how: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 200, "seed": 1}
    answer = client.chat.completions.create(model="qwen2", messages=MESSAGES, **how).choices[0]
    assert answer.finish_reason == "tool_calls"
    for call in answer.message.tool_calls or ():
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert answer.message.tool_calls


class Place(BaseModel):
    city: str
    visited: bool


def test_structured_output(live: Live) -> None:
    client = client_of(live)
    limited = {**Place.model_json_schema(), "additionalProperties": False}
    limited["properties"]["city"] = {"enum": ["Paris", "Rome"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": limited}}
    how: dict[str, Any] = {"model": "qwen2", "messages": MESSAGES, "max_tokens": 200, "temperature": 0}
    answer = client.chat.completions.create(response_format=wanted, **how)
    Place.model_validate_json(answer.choices[0].message.content or "")
    choice = client.chat.completions.create(
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, **how
    )
    assert choice.choices[0].message.content in ("yes", "no")
    regex = client.completions.create(
        model="qwen2", prompt="a", max_tokens=50, extra_body={"structured_outputs": {"regex": "[ab]{3}c"}}
    )
    assert re.fullmatch("[ab]{3}c", regex.choices[0].text)
    grammar = {"type": "regex", "value": "[0-9]{4}"}
    body = {"inputs": "a", "parameters": {"grammar": grammar, "max_new_tokens": 50}}
    assert re.fullmatch("[0-9]{4}", live.post("/generate", body).json()["generated_text"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "function name must be"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": "all"}, "tools must be array type."),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice string not in [none, auto, required]"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "x"}}}, "allowed: weather"),
        ({"tool_choice": "required"}, "required needs tools"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}}, ""),
        ({"structured_outputs": {"regexp": "a"}}, "regex"),
        ({"structured_outputs": {"regex": "("}}, "regex"),
        ({"structured_outputs": {"regex": "(a{1000}){1000}"}}, "regex"),
        ({"structured_outputs": {"json": "{}", "regex": "a"}}, "exactly one"),
    ],
)
def test_what_is_wrong(live: Live, change: dict, says: str) -> None:
    answer = live.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, **change})
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


def test_what_a_backend_cannot_do_is_refused_by_name(serve: Serve) -> None:
    live = serve(load=lambda progress: ScriptedBackend("x"))
    answer = live.post("/v1/completions", {"prompt": "a", "logprobs": 1})
    assert answer.json()["error"]["message"] == "logprobs: the engine Scripted does not have them."
    answer = live.post("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "a"}})
    assert answer.status_code == 400

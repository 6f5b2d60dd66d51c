"""Tool calls: what requests say of tools, and calls found in the text that a model writes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from llm_boost.service.body import Body, Says
from llm_boost.service.faults import invalid

FunctionName = Annotated[
    str,
    Field(pattern=r"^[a-zA-Z0-9_\u4e00-\u9fa5-]{1,64}$"),
    Says("function name must be 1 to 64 of a-z, A-Z, 0-9, _, - and Chinese characters, got {}."),
]


class Function(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


Tools = Annotated[list[Tool], Field(max_length=128)]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    Says("tool_choice string not in [none, auto, required], or an object that names a function."),
]


@dataclass(frozen=True)
class Call:
    """One tool call; `arguments` is JSON as text, as OpenAI's clients expect it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True)
class Found:
    """What a piece of text came to."""

    content: str = ""
    calls: Sequence[Call] = ()


class Parser(Protocol):
    """Reads a completion as it grows. What may yet become a call is held back."""

    def push(self, text: str) -> Found: ...

    def finish(self) -> Found: ...


def parser_for(template: str | None, tools: Sequence[Tool], choice: str | NamedTool | None) -> Parser:
    """The parser for what a model with this chat template writes, under a request's tool_choice."""
    names = {tool.function.name for tool in tools}
    if isinstance(choice, NamedTool):
        return NamedParser(choice.function.name)
    if choice == "required":
        return ListParser(names)
    if template is not None and "<tool_call>" not in template and "parameters" in template:
        return LlamaParser(names)
    return HermesParser(names)


def schema_for(tools: Sequence[Tool], choice: str | NamedTool | None) -> dict[str, Any] | None:
    """What the whole text must be when calls are required: the arguments of one tool, or a list of calls."""
    schemas = {tool.function.name: tool.function.parameters or {"type": "object"} for tool in tools}
    if isinstance(choice, NamedTool):
        if choice.function.name not in schemas:
            raise invalid(
                f"tool_choice: got {choice.function.name[:80]!r}, allowed: {', '.join(schemas) or 'no tool'}",
                "tool_choice",
            )
        return schemas[choice.function.name]
    if choice != "required":
        return None
    if not schemas:
        raise invalid("tool_choice: required needs tools.", "tool_choice")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in schemas.items()
    ]
    return {"type": "array", "minItems": 1, "maxItems": 16, "items": {"anyOf": calls}}


class HermesParser:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, of Hermes and Qwen."""

    begin, end = "<tool_call>", "</tool_call>"

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._held = names, ""

    def push(self, text: str) -> Found:
        self._held += text
        content, calls = "", []
        while True:
            before, begun, after = self._held.partition(self.begin)
            if not begun:
                keep = _overlap(self._held, self.begin)
                content += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            inside, ended, rest = after.partition(self.end)
            if not ended:
                content, self._held = content + before, begun + after
                break
            call = _call(_json(inside), self._names)
            content += before if call else before + begun + inside + ended
            calls += [call] if call else []
            self._held = rest.lstrip("\n") if call else rest
        return Found(content.rstrip("\n") if calls and not content.strip() else content, calls)

    def finish(self) -> Found:
        """A call whose end is missing counts when its JSON is whole."""
        held, self._held = self._held, ""
        call = (
            _call(_json(held.removeprefix(self.begin)), self._names) if held.startswith(self.begin) else None
        )
        return Found("", [call]) if call else Found(held)


class LlamaParser:
    """`{"name": ..., "parameters": {...}}` as the whole text, several separated by `;`, of Llama 3."""

    tag = "<|python_tag|>"

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._held = names, ""
        self._is_content = False

    def push(self, text: str) -> Found:
        if self._is_content:
            return Found(text)
        self._held += text
        start = self._held.lstrip()
        if not start or start[0] == "{" or start.startswith(self.tag[: len(start)]):
            return Found()
        self._is_content, held, self._held = True, self._held, ""
        return Found(held)

    def finish(self) -> Found:
        held, self._held = self._held, ""
        calls, rest = [], held.strip().removeprefix(self.tag).strip()
        while rest:
            try:
                value, end = json.JSONDecoder().raw_decode(rest)
            except (ValueError, RecursionError):
                return Found(held)
            call = _call(value, self._names)
            if call is None:
                return Found(held)
            calls.append(call)
            rest = rest[end:].lstrip("; \n")
        return Found("", calls)


class ListParser:
    """A JSON list of calls, which the request's grammar has seen to."""

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._held = names, ""

    def push(self, text: str) -> Found:
        self._held += text
        return Found()

    def finish(self) -> Found:
        entries = _json(self._held)
        calls = [_call(entry, self._names) for entry in entries] if isinstance(entries, list) else []
        found = [call for call in calls if call is not None]
        return Found("", found) if found else Found(self._held)


class NamedParser(ListParser):
    """The arguments of the one tool that the request named."""

    def __init__(self, name: str) -> None:
        super().__init__({name})
        self._name = name

    def finish(self) -> Found:
        return Found("", [Call(self._name, self._held)])


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any, names: Collection[str]) -> Call | None:
    """None for what is no call of a tool that the request offers."""
    if not isinstance(value, Mapping) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(value["name"], arguments)


def _overlap(text: str, marker: str) -> int:
    """How many of the text's last characters may be the marker's first."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)

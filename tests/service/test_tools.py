"""Tool calls in every format, whole and in pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_boost.service.faults import Fault
from llm_boost.service.tools import (
    Call,
    Function,
    HermesParser,
    LlamaParser,
    NamedFunction,
    NamedTool,
    Parser,
    Tool,
    parser_for,
    schema_for,
)

NAMES = {"weather", "time"}
HERMES = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "上海"}}\n</tool_call>'
TWO = HERMES + '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
LLAMA = '{"name": "weather", "parameters": {"city": "上海"}}'


def read(parser: Parser, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    found = [*(parser.push(piece) for piece in pieces), parser.finish()]
    return "".join(f.content for f in found), [(c.name, c.arguments) for f in found for c in f.calls]


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (HERMES, "Let me see.\n", ["weather"]),
        (TWO, "Let me see.\n", ["weather", "time"]),
        ("no call < tool_call>", "no call < tool_call>", []),
        ("<tool_call>{bad</tool_call> on", "<tool_call>{bad</tool_call> on", []),
        ('<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
        ('<tool_call>{"name": "time"}', "", ["time"]),
        ("<tool_call>{", "<tool_call>{", []),
        ("ends in <tool", "ends in <tool", []),
    ],
)
def test_hermes(text: str, content: str, names: list[str]) -> None:
    got, calls = read(HermesParser(NAMES), [text])
    assert (got, [name for name, _ in calls]) == (content, names)


@given(st.lists(st.integers(0, len(TWO)), max_size=12))
def test_hermes_in_any_pieces(cuts: list[int]) -> None:
    edges = sorted({0, *cuts, len(TWO)})
    pieces = [TWO[a:b] for a, b in itertools.pairwise(edges)]
    content, calls = read(HermesParser(NAMES), pieces)
    assert content.strip() == "Let me see."
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("weather", {"city": "上海"}),
        ("time", {}),
    ]


@pytest.mark.parametrize(
    ("text", "content", "count"),
    [
        (LLAMA, "", 1),
        (f"<|python_tag|>{LLAMA}; {LLAMA}", "", 2),
        (f"  {LLAMA}\n", "", 1),
        ("It is sunny.", "It is sunny.", 0),
        ('{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', 0),
        ('{"half": ', '{"half": ', 0),
    ],
)
def test_llama(text: str, content: str, count: int) -> None:
    for pieces in ([text], list(text)):
        got, calls = read(LlamaParser(NAMES), pieces)
        assert (got, len(calls)) == (content, count)


def test_choices() -> None:
    tool = Tool(type="function", function=Function(name="weather", parameters={"type": "object"}))
    named = NamedTool(function=NamedFunction(name="weather"))
    assert schema_for([tool], "auto") is None
    assert schema_for([tool], named) == {"type": "object"}
    assert read(parser_for(None, [tool], named), ['{"a"', ": 1}"]) == ("", [("weather", '{"a": 1}')])
    required = '[{"name": "weather", "arguments": {"b": 2}}]'
    assert read(parser_for(None, [tool], "required"), [required]) == ("", [("weather", '{"b": 2}')])
    assert isinstance(parser_for("... <tool_call> ...", [tool], None), HermesParser)
    assert isinstance(parser_for('{"name": ..., "parameters": ...}', [tool], "auto"), LlamaParser)
    with pytest.raises(Fault, match="allowed: weather"):
        schema_for([tool], NamedTool(function=NamedFunction(name="other")))
    assert Call("a", "{}").id != Call("a", "{}").id

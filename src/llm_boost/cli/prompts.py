"""Prompts from the command line and from files: what to complete, and how each JSONL line wants it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_boost.errors import RequestError
from llm_boost.suggest import did_you_mean

SAMPLING_KEYS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "stop", "ignore_eos", "max_new_tokens",
)  # fmt: skip
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A text to complete, or messages to answer; `sampling` holds what its own line says."""

    where: str  # how a message names it: `prompt 2`, `prompts.jsonl:7`
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    echo: bool = False  # the output repeats the prompt before its continuation
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def as_chat(self, system: str | None) -> Prompt:
        """The text as a user's message, after `system` where no system message stands first."""
        messages = self.messages or ({"role": "user", "content": self.text},)
        if system is not None and messages[0].get("role") != "system":
            messages = ({"role": "system", "content": system}, *messages)
        return Prompt(self.where, messages=messages, sampling=self.sampling)


def argument_prompts(repeated: Sequence[str], completed: Sequence[str]) -> list[Prompt]:
    """Prompts of the command line: those whose output repeats them, then the others; RequestError."""
    texts = [(text, True) for text in repeated] + [(text, False) for text in completed]
    return [
        Prompt(f"prompt {number}", _argument_text(f"prompt {number}", text), echo=echo)
        for number, (text, echo) in enumerate(texts, 1)
    ]


def _argument_text(where: str, argument: str) -> str:
    """UTF-8, whatever the locale in which Python has read the command line."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: not UTF-8 text (byte {error.start})") from None
    except UnicodeEncodeError:
        return argument


def read_prompt_file(name: str) -> list[Prompt]:
    """Prompts of a text file, one a line (blank lines skipped), or of a .jsonl file, one object a line.

    An object has "prompt" (text) or "messages" (a list of {"role", "content"}), and may have any of
    SAMPLING_KEYS. `-` reads text from standard input. Raises RequestError with file and line.
    """
    try:
        raw = _standard_input() if name == "-" else Path(name).expanduser().read_bytes()
        content = raw.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{name}: cannot read the prompt file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: not UTF-8 text (byte {error.start})") from None
    numbered = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not numbered:
        raise RequestError(f"{name}: no prompt in the file; it needs one a line")
    if name.endswith(".jsonl"):
        return [_from_json(f"{name}:{number}", line) for number, line in numbered]
    return [Prompt(f"{name}:{number}", line.rstrip("\r")) for number, line in numbered]


def _standard_input() -> bytes:
    return sys.stdin.buffer.read() if sys.stdin else b""


def check_not_empty(prompts: Iterable[Prompt]) -> None:
    for prompt in prompts:
        if prompt.text == "":
            raise RequestError(f"{prompt.where} is empty; give some text")


def _from_json(where: str, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(entry, dict):
        raise RequestError(
            f'{where}: got {line.strip()[:40]!r}, allowed: an object with "prompt" or "messages"'
        )
    known = ("prompt", "messages", *SAMPLING_KEYS)
    for key in entry:
        if key not in known:
            raise RequestError(
                f"{where}: unknown key {key!r}{did_you_mean(key, known)} (known: {', '.join(known)})"
            )
    if ("prompt" in entry) == ("messages" in entry):
        raise RequestError(f'{where}: allowed: either "prompt" or "messages"')
    sampling = {key: value for key, value in entry.items() if key in SAMPLING_KEYS}
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str):
            raise RequestError(f"{where}: prompt: got {entry['prompt']!r}, allowed: text")
        return Prompt(where, text=entry["prompt"], sampling=sampling)
    messages = entry["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise RequestError(f"{where}: messages: allowed: a list, not empty, of {{'role', 'content'}} objects")
    for message in messages:
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise RequestError(
                f'{where}: messages: got {str(message)[:80]}, allowed: an object with "role" and "content"'
            )
        if not isinstance(message["content"], str | list | None):
            raise RequestError(
                f"{where}: messages: content: got {str(message['content'])[:80]}, allowed: text or a list"
            )
    return Prompt(where, messages=tuple(messages), sampling=sampling)

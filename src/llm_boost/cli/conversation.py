"""The history of a chat, and how much of it the model sees."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from llm_boost.errors import ConfigError, RequestError


class Message(TypedDict):
    role: str
    content: str


Tokenize = Callable[[Sequence[Message]], list[int]]


class Conversation:
    """A system message, and exchanges of a question and its answer.

    When the context is full the oldest exchanges are left out, as many as needed; the system message and the
    new question always stay. What is left out is not forgotten: `save` writes all of it.
    """

    def __init__(self, system: str | None) -> None:
        self.system = system
        self.num_left_out = 0  # exchanges, the oldest ones
        self._exchanges: list[tuple[str, str]] = []
        self._saved: set[Path] = set()

    def reset(self) -> None:
        """Forgets the exchanges; the system message stays."""
        self._exchanges.clear()
        self.num_left_out = 0

    def prompt(self, question: str, tokenize: Tokenize, limit: int) -> list[int]:
        """The token ids of what the model sees, at most `limit`; RequestError if the question is too long."""
        while True:
            ids = tokenize(self._messages(self._exchanges[self.num_left_out :], question))
            if len(ids) <= limit:
                return ids
            if self.num_left_out == len(self._exchanges):
                raise RequestError(f"the message has {len(ids)} tokens, allowed at most {limit}")
            self.num_left_out += 1

    def add(self, question: str, answer: str) -> None:
        self._exchanges.append((question, answer))

    def save(self, path: Path) -> None:
        """Writes a line that `predict --predict_file` takes; never over a file that was not written here."""
        line = json.dumps({"messages": self._messages(self._exchanges)}, ensure_ascii=False)
        try:
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                file.write(line + "\n")
        except FileExistsError:
            raise ConfigError(f"{path}: exists already; choose another name") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
        self._saved.add(path)

    def __len__(self) -> int:
        return len(self._exchanges)

    def _messages(self, exchanges: Sequence[tuple[str, str]], question: str | None = None) -> list[Message]:
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for asked, answer in exchanges:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        if question is not None:
            messages.append({"role": "user", "content": question})
        return messages

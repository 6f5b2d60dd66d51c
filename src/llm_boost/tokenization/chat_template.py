"""Chat templates: jinja2 code that came with a checkpoint, so code that nobody here has read.

What is guaranteed, whatever the template does:
- time: after `MAX_SECONDS` the kernel ends the render, even inside one long multiplication;
- size: at most `MAX_CHARACTERS` come back, and no more than 512 MiB are ever held;
- reach: jinja's immutable sandbox, in a process of its own that can open no file or socket and does not see
  this process's memory; it is given the messages and the template's variables as JSON, nothing else.

No sandbox inside one Python process can promise the first two: a single expression such as `9**(9**9)` holds
the interpreter until it is done. The process starts with the first chat (about a tenth of a second) and
serves all later ones (well under a millisecond each); it ends with its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from llm_boost.errors import RequestError, TokenizerError
from llm_boost.tokenization.pipelines import one_line

MAX_SECONDS = 2.0
MAX_CHARACTERS = 16 << 20


def render_chat(template: str, variables: Mapping[str, Any], source: str) -> str:
    """The template's text; `source` names it in errors.

    RequestError: the template refused the messages (raise_exception), or they are not plain JSON data.
    TokenizerError: it is not valid, failed, or went beyond a limit.
    """
    try:
        request = json.dumps(
            {
                "template": template,
                "variables": dict(variables),
                "seconds": MAX_SECONDS,
                "characters": MAX_CHARACTERS,
            }
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"messages: only plain JSON data can be in a chat: {one_line(error)}") from None
    answer, status = _worker.ask(request)
    if answer is None:
        if status == -signal.SIGALRM:
            raise TokenizerError(f"{source}: the chat template did not end within {MAX_SECONDS:g} s")
        raise TokenizerError(
            f"{source}: the process that renders the chat template ended with status {status}"
        )
    if "refused" in answer:
        raise RequestError(f"messages: refused by the chat template: {_shortened(answer['refused'])}")
    if "error" in answer:
        raise TokenizerError(f"{source}: chat template: {_shortened(answer['error'])}")
    return answer["text"]


def _shortened(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 300 else line[:300] + "..."


class _Worker:
    """One process, started when needed, and again after a template broke it; serves one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._of_parent: subprocess.Popen[bytes] | None = None

    def ask(self, request: str) -> tuple[dict[str, str] | None, int]:
        """(the answer, 0), or (None, the process's exit status) when it ended instead."""
        with self._lock:
            process = self._running()
            try:
                _pipe(process.stdin).write(request.encode("ascii") + b"\n")
                _pipe(process.stdin).flush()
                line = _pipe(process.stdout).readline()
            except BrokenPipeError:
                line = b""
            except BaseException:  # Ctrl-C: the answer to this request must not meet the next one
                process.kill()
                self._end()
                raise
            if line.endswith(b"\n"):
                answer: dict[str, str] = json.loads(line)
                return answer, 0
            return None, self._end()

    def close(self) -> None:
        with self._lock:
            if self._process is not None:
                self._end()

    def forget(self) -> None:
        """After a fork the process and its pipes are the parent's: leave them alone, and start another."""
        self._lock = threading.Lock()
        self._of_parent, self._process = self._process, None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("chat_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    def _end(self) -> int:
        process, self._process = self._process, None
        assert process is not None
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).close()
        try:
            status = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        _pipe(process.stdout).close()
        return status


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


_worker = _Worker()
atexit.register(_worker.close)
os.register_at_fork(after_in_child=_worker.forget)

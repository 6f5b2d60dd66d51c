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

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_boost.errors import RequestError, TokenizerError
from llm_boost.tokenization.pipelines import one_line
from llm_boost.worker_process import WorkerProcess

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
    text: str = answer["text"]
    return text


def _shortened(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 300 else line[:300] + "..."


_worker = WorkerProcess(Path(__file__).with_name("chat_worker.py"))

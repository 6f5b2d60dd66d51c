"""The process that renders chat templates. Run as a script by `chat_template`; never imported.

One JSON line in, {"template": str, "variables": {...}, "seconds": float, "characters": int}, gives one JSON
line out: {"text": str}, or {"refused": str} when the template called raise_exception, or {"error": str}.
A render that outlives its seconds is ended by the kernel's own alarm, even in the middle of a C function;
there is no memory beyond MEMORY_BYTES, and nothing can be opened.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20


class Refused(Exception):
    """The template called raise_exception: it does not want these messages."""


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is just a block."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def raise_exception(message: str) -> NoReturn:
    raise Refused(str(message))


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


ENVIRONMENT = make_environment()


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(template)


def render(template: str, variables: dict[str, Any], characters: int) -> str:
    parts = []
    for part in compiled(template).generate(variables):
        characters -= len(part)
        if characters < 0:
            raise ValueError("the text grows beyond the limit")
        parts.append(part)
    return "".join(parts)


def answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        return {"text": render(request["template"], request["variables"], request["characters"])}
    except Refused as refusal:
        return {"refused": str(refusal)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def lock_down() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # Whatever is loaded lazily must be loaded now: soon no file can be opened any more.
    for template in ("{{ strftime_now('%c') }}", "{{ 1 / 0 }}", "{% if %}"):
        answer({"template": template, "variables": {}, "characters": 100})
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    lock_down()
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        reply = json.dumps(answer(request)).encode("ascii")
        answers.write(reply + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the parent is gone
        os._exit(0)

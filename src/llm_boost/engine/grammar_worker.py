"""The process that tries grammars out. Run as a script by `grammar`; never imported.

One JSON line in, {"key": str, "vocab_size": int, "special": {id: text}, "limits": {...},
"cpu_seconds": float, "seconds": float}, gives one JSON line out: {"grammar": str, "bytes": int}, the rule in
llguidance's terms and the memory that it took, or {"error": str}. A rule that outlives its seconds is ended
by the kernel, even in the middle of a Rust function; one that wants more than MEMORY_BYTES is an error or the
end of the process.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import llguidance

MEMORY_BYTES = 512 << 20
STEPS = 3
STACK_BYTES = 4 << 20  # less than the threads have that compile what was found good here


class Vocabulary:
    """What compiling needs of a tokenizer: which bytes there are, and the special tokens' names."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, size: int, special: dict[int, str]) -> None:
        self.eos_token_id = size
        self.special_token_ids = [*special, size]
        self.tokens = [bytes([i]) if i < 256 else b"" for i in range(size)] + [b"<|end|>"]
        for token, text in special.items():
            self.tokens[token] = text.encode()

    def __call__(self, text: str) -> list[int]:
        return [byte for byte in text.encode() if byte < self.eos_token_id]


@functools.lru_cache(maxsize=4)
def tokenizer(vocab_size: int, special: str) -> llguidance.LLTokenizer:
    named = {int(token): text for token, text in json.loads(special).items()}
    return llguidance.LLTokenizer(Vocabulary(vocab_size, named), n_vocab=vocab_size + 1)  # type: ignore[arg-type]


def to_llguidance(kind: str, rule: Any, **options: Any) -> str:
    if kind in ("json", "json_object"):
        return json_grammar({"type": "object"} if kind == "json_object" else rule, **options)
    if kind == "structural_tag":
        return llguidance.StructTag.to_grammar(list(struct_tags(rule)))
    if kind == "choice":
        return llguidance.grammar_from("choice", json.dumps(rule))
    if kind == "grammar":
        return llguidance.grammar_from("gbnf" if "::=" in rule else "lark", rule)
    return llguidance.grammar_from("regex", rule)


def json_grammar(
    schema: Any,
    *,
    disable_any_whitespace: bool = False,
    disable_additional_properties: bool = False,
    whitespace_pattern: str | None = None,
) -> str:
    if disable_additional_properties:
        close_objects(schema)
    options: dict[str, Any] = {"whitespace_flexible": not disable_any_whitespace}
    if whitespace_pattern is not None:
        options["whitespace_pattern"] = whitespace_pattern
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=options)  # type: ignore[arg-type]


def close_objects(schema: Any) -> None:
    """Gives every schema with properties `additionalProperties: false`, unless it says something itself."""
    if isinstance(schema, list):
        for entry in schema:
            close_objects(entry)
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        if keyword in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"):
            for entry in value.values() if isinstance(value, dict) else ():
                close_objects(entry)
        elif keyword not in ("const", "enum", "default", "examples"):
            close_objects(value)
    if "properties" in schema or "patternProperties" in schema:
        schema.setdefault("additionalProperties", False)


def struct_tags(rule: Any) -> Iterator[llguidance.StructTag]:
    """vLLM's form: {"structures": [{"begin", "schema", "end"}], "triggers": [str]}."""
    for structure in rule["structures"]:
        begin = structure["begin"]
        trigger = next((text for text in rule["triggers"] if begin.startswith(text)), None)
        if not trigger:
            raise ValueError(f"no trigger is the beginning of {begin!r}")
        yield llguidance.StructTag(
            trigger=trigger, begin=begin, grammar=json.dumps(structure["schema"]), end=structure["end"]
        )


def take_steps(matcher: llguidance.LLMatcher) -> None:
    """The first bytes of some text: most rules that are too much for the parser are so at once."""
    for _ in range(STEPS):
        if matcher.is_stopped():
            return
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        if allowed == 0:
            return
        matcher.consume_token((allowed & -allowed).bit_length() - 1)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        words = tokenizer(request["vocab_size"], json.dumps(request["special"]))
        before = resident_bytes()
        grammar = to_llguidance(**json.loads(request["key"]))
        limits = llguidance.LLParserLimits(**request["limits"])
        matcher = llguidance.LLMatcher(words, grammar, log_level=0, limits=limits)
        take_steps(matcher)
        if matcher.is_error():
            return {"error": matcher.get_error()}
        return {"grammar": grammar, "bytes": max(resident_bytes() - before, 0)}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB"}
    except KeyError as error:
        return {"error": f"{error} is missing"}
    except Exception as error:
        return {"error": str(error) or type(error).__name__}


def serve() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["cpu_seconds"])
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        reply = json.dumps(answer(request)).encode("ascii")
        try:
            answers.write(reply + b"\n")
            answers.flush()
        except BrokenPipeError:  # the parent is gone
            os._exit(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {alarm})
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()

"""What a text must look like: a JSON schema, a regular expression, a choice, a grammar. vLLM's names."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_boost.errors import RequestError

MAX_GRAMMAR_CHARS = 1 << 20  # of a schema, an expression or a grammar, as text
MAX_CHOICES = 10_000

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_JSON_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one rule for the whole text of a completion. Raises RequestError for anything else.

    What each may contain is said by llguidance: JSON Schema's draft 2020-12 but for a few keywords, regular
    expressions of Rust's `regex` crate, Lark grammars.
    """

    json: str | Mapping[str, Any] | bool | None = None  # a JSON schema, as text or as an object
    regex: str | None = None  # of the whole text, not of a part
    choice: Sequence[str] | None = None  # one of these strings
    grammar: str | None = None  # EBNF as llama.cpp's (`root ::= ...`), or Lark (`start: ...`)
    json_object: bool | None = None  # any JSON object
    structural_tag: str | Mapping[str, Any] | None = None  # {"structures": [...], "triggers": [...]}
    disable_any_whitespace: bool = False  # no whitespace between the parts of JSON
    disable_additional_properties: bool = False  # objects of the schema have the properties it names, alone
    whitespace_pattern: str | None = None  # a regular expression for whitespace between the parts of JSON

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            got = ", ".join(given) or "none"
            raise RequestError(f"structured_outputs: got {got}, allowed exactly one of {', '.join(KINDS)}")
        check = {"choice": _check_choice, "json_object": _check_json_object}.get(given[0])
        if check is not None:
            check(getattr(self, given[0]))
        else:
            _check_text(given[0], getattr(self, given[0]))
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(
                    f"structured_outputs.{name}: got {getattr(self, name)!r}, allowed True or False"
                )
        if self.whitespace_pattern is not None:
            _check_text("whitespace_pattern", self.whitespace_pattern)
            if self.disable_any_whitespace:
                raise RequestError(
                    "structured_outputs.whitespace_pattern: allowed without disable_any_whitespace"
                )
        used = [name for name in _JSON_OPTIONS if getattr(self, name)]
        if used and self.kind not in ("json", "json_object"):
            raise RequestError(
                f"structured_outputs.{used[0]}: allowed with json or json_object, got {self.kind}"
            )

    @property
    def kind(self) -> str:
        """Which rule it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    def key(self) -> str:
        """All of it as one line of JSON: equal rules have equal keys. RequestError: no plain JSON data."""
        try:
            rule: Any = getattr(self, self.kind)
            if self.kind in ("json", "structural_tag") and isinstance(rule, str):
                rule = json_module.loads(rule)
            options = {name: getattr(self, name) for name in _JSON_OPTIONS}
            key = json_module.dumps({"kind": self.kind, "rule": rule, **options}, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"structured_outputs.{self.kind}: no JSON: {error}") from None
        if len(key) > 2 * MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"structured_outputs.{self.kind}: got {len(key)} characters, "
                f"allowed at most {MAX_GRAMMAR_CHARS}"
            )
        return key


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no place in it")


def _check_text(name: str, value: Any) -> None:
    kinds = (str, Mapping, bool) if name == "json" else (str, Mapping) if name == "structural_tag" else (str,)
    if not isinstance(value, kinds):
        allowed = " or ".join(
            {str: "a string", Mapping: "an object", bool: "a boolean"}[kind] for kind in kinds
        )
        raise RequestError(f"structured_outputs.{name}: got {type(value).__name__}, allowed {allowed}")
    if isinstance(value, str) and not 1 <= len(value) <= MAX_GRAMMAR_CHARS:
        raise RequestError(
            f"structured_outputs.{name}: got {len(value)} characters, allowed 1..{MAX_GRAMMAR_CHARS}"
        )


def _check_choice(value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) and text for text in value):
        raise RequestError(
            f"structured_outputs.choice: got {type(value).__name__}, allowed a list of strings, none empty"
        )
    if not 1 <= len(value) <= MAX_CHOICES or sum(map(len, value)) > MAX_GRAMMAR_CHARS:
        raise RequestError(
            f"structured_outputs.choice: got {len(value)} strings of {sum(map(len, value))} characters, "
            f"allowed 1..{MAX_CHOICES} strings of at most {MAX_GRAMMAR_CHARS} characters together"
        )


def _check_json_object(value: Any) -> None:
    if value is not True:
        raise RequestError(f"structured_outputs.json_object: got {value!r}, allowed True")

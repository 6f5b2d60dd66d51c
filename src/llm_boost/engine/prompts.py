"""What may be given as a prompt, and its tokens."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Protocol, TypedDict

import numpy as np

from llm_boost.engine.batch import Int32Array
from llm_boost.errors import RequestError


class _Salted(TypedDict, total=False):
    cache_salt: str  # prompts of different salts, such as tenants', share nothing in the prefix cache


class TextPrompt(_Salted):
    prompt: str


class _TokensPromptText(_Salted, total=False):
    prompt: str  # the text of the tokens, if it is known: it comes back in the output


class TokensPrompt(_TokensPromptText):
    prompt_token_ids: list[int]


Prompt = str | TextPrompt | TokensPrompt

_ALLOWED = "a string, {'prompt': str} or {'prompt_token_ids': [int, ...]}"
_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class Encoder(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


def tokenize(prompt: Any, encoder: Encoder, vocab_size: int) -> tuple[str | None, Int32Array]:
    """The prompt's text (None if it came as ids) and its token ids [tokens]; RequestError for all else."""
    if not isinstance(prompt, dict):
        return _text(prompt), check_token_ids(encoder.encode(_text(prompt)), vocab_size)
    if not prompt.keys() <= _KEYS or prompt.keys() <= {"cache_salt"}:
        raise RequestError(f"prompt: got the keys {sorted(map(str, prompt))}, allowed {_ALLOWED}")
    text = _text(prompt["prompt"]) if prompt.get("prompt") is not None else None
    if "prompt_token_ids" in prompt:
        return text, check_token_ids(prompt["prompt_token_ids"], vocab_size)
    return tokenize(prompt["prompt"], encoder, vocab_size)


def cache_salt(prompt: Any) -> str | None:
    """The salt that comes with a prompt; RequestError unless it is text."""
    salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise RequestError(f"cache_salt: got {salt!r}, allowed text, not empty")
    return salt


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise RequestError(f"prompt: got {type(prompt).__name__}, allowed {_ALLOWED}")
    if not prompt:
        raise RequestError("prompt: got an empty string, allowed at least one character")
    return prompt


def check_token_ids(ids: Any, vocab_size: int) -> Int32Array:
    """The ids as an array [tokens]; RequestError unless each is in the vocabulary, and there is one."""
    if not isinstance(ids, (list, tuple, np.ndarray)):
        raise RequestError(f"prompt_token_ids: got {type(ids).__name__}, allowed a list of integers")
    if len(ids) == 0:
        raise RequestError("prompt_token_ids: got no tokens, allowed at least one")
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= int(token) < vocab_size:
            raise RequestError(
                f"prompt_token_ids[{index}]: got {token!r}, allowed an integer 0..{vocab_size - 1}"
            )
    return np.array(ids, np.int32)

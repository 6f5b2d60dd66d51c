"""The tokenizer inside a GGUF file, from its `tokenizer.*` metadata.

Keys and defaults as GGUF's specification and llama.cpp have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from llm_boost.errors import TokenizerError
from llm_boost.tokenization.pipelines import (
    PRETOKENIZERS,
    SentencePieceOptions,
    add_boundaries,
    byte_level_bpe,
    sentencepiece_bpe,
)
from llm_boost.tokenization.sentencepiece_model import PieceType
from llm_boost.tokenization.tokenizer import ChatTemplates, SpecialTokens, Tokenizer

_PREFIX = "tokenizer.ggml."


def load_gguf_tokenizer(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """See `Tokenizer.from_gguf`."""
    fields = _Fields(metadata, source)
    tokens = fields.list_of("tokens", str)
    vocab: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        vocab.setdefault(token, token_id)
    types = (
        fields.list_of("token_type", int) if fields.has("token_type") else [PieceType.NORMAL] * len(tokens)
    )
    if len(types) != len(tokens):
        raise TokenizerError(f"{source}: token_type has {len(types)} entries for {len(tokens)} tokens")

    kind = fields.text("model")
    if kind == "gpt2":
        backend, add_bos = _byte_level(fields, vocab)
    elif kind == "llama":
        backend, add_bos = _sentencepiece(fields, vocab, tokens, types), True
    else:
        raise TokenizerError(
            f"{source}: {_PREFIX}model is {kind!r}; supported are gpt2 (BPE) and llama (sentencepiece)"
        )
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind_of is not PieceType.USER_DEFINED)
            for token, kind_of in zip(tokens, map(_piece_type, types), strict=True)
            if token and kind_of in (PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.UNKNOWN)
        ]
    )
    special = SpecialTokens(
        bos=fields.token("bos_token_id", tokens),
        eos=fields.token("eos_token_id", tokens),
        unk=fields.token("unknown_token_id", tokens),
        pad=fields.token("padding_token_id", tokens),
    )
    add_boundaries(
        backend,
        special.bos if fields.flag("add_bos_token", add_bos) else None,
        special.eos if fields.flag("add_eos_token", False) else None,
    )
    ends = [fields.token_id(name, tokens) for name in ("eos_token_id", "eot_token_id", "eom_token_id")]
    return Tokenizer(
        backend,
        special,
        source=source,
        eos_token_ids=[token_id for token_id in ends if token_id is not None],
        chat_templates=_chat_templates(metadata, source),
    )


def _byte_level(fields: _Fields, vocab: Mapping[str, int]) -> tuple[Backend, bool]:
    name = fields.text("pre") if fields.has("pre") else "default"
    if name not in PRETOKENIZERS:
        raise TokenizerError(
            f"{fields.source}: {_PREFIX}pre is {name!r}; "
            f"supported pre-tokenizers are {', '.join(sorted(PRETOKENIZERS))}"
        )
    merges = []
    for index, merge in enumerate(fields.list_of("merges", str)):
        cut = merge.find(" ", 1)
        if cut < 0 or cut == len(merge) - 1:
            raise TokenizerError(
                f"{fields.source}: {_PREFIX}merges[{index}] is {merge[:80]!r}, it must be two tokens"
            )
        merges.append((merge[:cut], merge[cut + 1 :]))
    family = PRETOKENIZERS[name]
    return byte_level_bpe(vocab, merges, family, fields.source), family.add_bos


def _sentencepiece(fields: _Fields, vocab: Mapping[str, int], tokens: list[str], types: list[int]) -> Backend:
    scores = fields.list_of("scores", float)
    if len(scores) != len(tokens):
        raise TokenizerError(
            f"{fields.source}: {_PREFIX}scores has {len(scores)} entries for {len(tokens)} tokens"
        )
    mergeable = (PieceType.NORMAL, PieceType.UNUSED)
    return sentencepiece_bpe(
        vocab,
        {
            token: score
            for token_id, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True))
            if kind in mergeable and vocab[token] == token_id
        },
        SentencePieceOptions(
            unk_token=fields.token("unknown_token_id", tokens) or "<unk>",
            byte_fallback=PieceType.BYTE in types,
            add_dummy_prefix=fields.flag("add_space_prefix", True),
            remove_extra_whitespaces=fields.flag("remove_extra_whitespaces", False),
        ),
        fields.source,
    )


def _chat_templates(metadata: Mapping[str, Any], source: str) -> ChatTemplates:
    """`tokenizer.chat_template`, and the named ones beside it as `tokenizer.chat_template.<name>`."""
    templates = {}
    for key, value in metadata.items():
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
            if not isinstance(value, str):
                raise TokenizerError(f"{source}: {key} is a {type(value).__name__}, it must be a text")
            templates[key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default"] = value
    return ChatTemplates(templates, f"{source}: tokenizer.chat_template")


def _piece_type(value: int) -> PieceType:
    try:
        return PieceType(value)
    except ValueError:
        return PieceType.NORMAL  # 0 is "undefined"; llama.cpp treats what it does not know as ordinary text


class _Fields:
    """The `tokenizer.ggml.*` keys, each checked when it is asked for."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self.source = source

    def has(self, name: str) -> bool:
        return self._metadata.get(_PREFIX + name) is not None

    def text(self, name: str) -> str:
        return str(self._checked(name, str))

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._checked(name, bool)) if self.has(name) else default

    def list_of(self, name: str, kind: type) -> list[Any]:
        values = list(self._checked(name, list))
        accepted = (int, float) if kind is float else (kind,)
        for index, value in enumerate(values):
            if not isinstance(value, accepted) or value != value:
                raise TokenizerError(
                    f"{self.source}: {_PREFIX}{name}[{index}] is {value!r}, it must be a {kind.__name__}"
                )
        return values

    def token_id(self, name: str, tokens: list[str]) -> int | None:
        if not self.has(name):
            return None
        token_id = int(self._checked(name, int))
        if not 0 <= token_id < len(tokens):
            raise TokenizerError(
                f"{self.source}: {_PREFIX}{name} is {token_id}, there are {len(tokens)} tokens"
            )
        return token_id

    def token(self, name: str, tokens: list[str]) -> str | None:
        token_id = self.token_id(name, tokens)
        return None if token_id is None else tokens[token_id]

    def _checked(self, name: str, kind: type) -> Any:
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            raise TokenizerError(
                f"{self.source}: {_PREFIX}{name} is missing, so the file has no usable tokenizer"
            )
        if isinstance(value, np.ndarray):  # how the GGUF reader gives arrays of numbers
            value = value.tolist()
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TokenizerError(
                f"{self.source}: {_PREFIX}{name} is a {type(value).__name__}, it must be a {kind.__name__}"
            )
        return value

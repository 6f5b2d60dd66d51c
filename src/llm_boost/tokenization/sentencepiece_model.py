"""Reader of sentencepiece's `tokenizer.model`, a protobuf whose schema is `sentencepiece_model.proto`.

Only the few fields that encoding needs are read, and nothing is allocated beyond the file's own size.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from llm_boost.errors import TokenizerError
from llm_boost.protobuf import as_bytes, as_int32, as_text, read_fields

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


class PieceType(IntEnum):
    """`SentencePiece.Type`; GGUF's `tokenizer.ggml.token_type` uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: PieceType


_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass
class SentencePieceModel:
    """The fields that matter, with the schema's defaults."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: int = 1
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    def token(self, token_id: int) -> str | None:
        """The piece with this id; -1 means that the model has none."""
        return self.pieces[token_id].text if 0 <= token_id < len(self.pieces) else None


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a BPE `tokenizer.model`; damage, or a kind that Llama models do not use, is a TokenizerError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}") from None
    try:
        model = parse_sentencepiece_model(data)
    except ValueError as error:
        if _TIKTOKEN_LINE.match(data):
            raise TokenizerError(
                f"{path}: a tiktoken vocabulary (as Llama 3's) is not supported; use tokenizer.json"
            ) from None
        raise TokenizerError(f"{path}: not a sentencepiece model: {error}") from None
    _require_supported(model, path)
    return model


def parse_sentencepiece_model(data: bytes) -> SentencePieceModel:
    """Parse the protobuf; ValueError says what is wrong and at which byte."""
    model = SentencePieceModel()
    for number, value in read_fields(memoryview(data)):
        if number == 1:
            model.pieces.append(_piece(as_bytes(value), len(model.pieces)))
        elif number == 2:
            _read_trainer_spec(model, as_bytes(value))
        elif number == 3:
            _read_normalizer_spec(model, as_bytes(value))
    if not model.pieces:
        raise ValueError("it holds no pieces")
    return model


def _piece(data: memoryview, index: int) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    try:
        for number, value in read_fields(data):
            if number == 1:
                text = as_text(value)
            elif number == 2:
                (score,) = struct.unpack("<f", as_bytes(value))
            elif number == 3:
                kind = PieceType(as_int32(value))
    except (ValueError, struct.error) as error:
        raise ValueError(f"piece {index}: {error}") from None
    if not text or score != score:
        raise ValueError(f"piece {index}: its text is {text!r} and its score {score}")
    return Piece(text, score, kind)


def _read_trainer_spec(model: SentencePieceModel, data: memoryview) -> None:
    for number, value in read_fields(data):
        if number == 3:
            model.model_type = as_int32(value)
        elif number == 24:
            model.whitespace_as_suffix = bool(as_int32(value))
        elif number == 35:
            model.byte_fallback = bool(as_int32(value))
        elif number == 40:
            model.unk_id = as_int32(value)
        elif number == 41:
            model.bos_id = as_int32(value)
        elif number == 42:
            model.eos_id = as_int32(value)
        elif number == 43:
            model.pad_id = as_int32(value)


def _read_normalizer_spec(model: SentencePieceModel, data: memoryview) -> None:
    for number, value in read_fields(data):
        if number == 2:
            model.charsmap = bytes(as_bytes(value))
        elif number == 3:
            model.add_dummy_prefix = bool(as_int32(value))
        elif number == 4:
            model.remove_extra_whitespaces = bool(as_int32(value))
        elif number == 5:
            model.escape_whitespaces = bool(as_int32(value))


def _require_supported(model: SentencePieceModel, path: Path) -> None:
    if model.model_type != 2:
        kind = _MODEL_TYPES.get(model.model_type, str(model.model_type))
        raise TokenizerError(
            f"{path}: model_type is {kind}; only bpe is supported: convert it to tokenizer.json"
        )
    if model.charsmap:
        raise TokenizerError(
            f"{path}: it normalises by a table (precompiled_charsmap), only identity is supported; "
            "convert it to tokenizer.json"
        )
    if model.whitespace_as_suffix or not model.escape_whitespaces:
        raise TokenizerError(
            f"{path}: treat_whitespace_as_suffix={model.whitespace_as_suffix}, "
            f"escape_whitespaces={model.escape_whitespaces}; only false and true are supported"
        )

"""GGUF metadata as plain values and lists: read from a file, or made from the golden vocabularies."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import sentencepiece
from tokenizer_goldens import GOLDENS

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_metadata(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        magic, _version, _tensors, pairs = struct.unpack("<4sIQQ", file.read(24))
        assert magic == b"GGUF"
        return {_text(file): _value(file, _number(file, "I")) for _ in range(pairs)}


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _text(file)
    if kind == 9:
        element, count = _number(file, "I"), _number(file, "Q")
        return [_value(file, element) for _ in range(count)]
    return _number(file, _SCALARS[kind])


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "Q")).decode("utf-8")


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, file.read(struct.calcsize(code)))[0]


def qwen2_metadata() -> dict[str, Any]:
    """What a GGUF file would say of the tiny Qwen2 vocabulary."""
    config = json.loads((GOLDENS / "qwen2" / "tokenizer_config.json").read_text())
    vocab = json.loads((GOLDENS / "qwen2" / "vocab.json").read_text())
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [1] * len(tokens)
    for token in config["added_tokens_decoder"].values():
        tokens.append(token["content"])
        types.append(3 if token["special"] else 4)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": (GOLDENS / "qwen2" / "merges.txt").read_text().split("\n")[1:-1],
        "tokenizer.ggml.eos_token_id": 602,
        "tokenizer.ggml.padding_token_id": 600,
    }


def llama_metadata(processor: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """What a GGUF file would say of the tiny Llama vocabulary."""
    ids = range(processor.get_piece_size())
    types = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }

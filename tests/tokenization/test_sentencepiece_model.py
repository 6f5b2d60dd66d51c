"""The reader of tokenizer.model: equal to sentencepiece's, and unharmed by any bytes."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_goldens import GOLDENS

from llm_boost.errors import TokenizerError
from llm_boost.tokenization import load_tokenizer
from llm_boost.tokenization.sentencepiece_model import PieceType, parse_sentencepiece_model

DATA = (GOLDENS / "llama" / "tokenizer.model").read_bytes()


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def piece(text: str, score: float = 0.0, kind: int = 1) -> bytes:
    content = field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, kind)
    return field(1, content)


BPE = field(2, field(3, 2))


def test_equal_to_sentencepiece(processor: sentencepiece.SentencePieceProcessor) -> None:
    model = parse_sentencepiece_model(DATA)
    assert [entry.text for entry in model.pieces] == [
        processor.id_to_piece(index) for index in range(processor.get_piece_size())
    ]
    assert [entry.score for entry in model.pieces] == [
        processor.get_score(index) for index in range(processor.get_piece_size())
    ]
    assert [entry.type is PieceType.BYTE for entry in model.pieces] == [
        processor.is_byte(index) for index in range(processor.get_piece_size())
    ]
    assert (
        model.model_type,
        model.byte_fallback,
        model.unk_id,
        model.bos_id,
        model.eos_id,
        model.pad_id,
    ) == ((2, True, 0, 1, 2, -1))
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces, model.charsmap) == (True, False, b"")


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    try_to_parse(data)


@given(st.lists(st.tuples(st.integers(0, len(DATA) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(DATA)
    for position, byte in changes:
        data[position] = byte
    try_to_parse(bytes(data))


@given(st.integers(0, len(DATA)))
def test_truncated(length: int) -> None:
    try_to_parse(DATA[:length])


def try_to_parse(data: bytes) -> None:
    """A model or a ValueError; nothing else."""
    try:
        model = parse_sentencepiece_model(data)
    except ValueError:
        return
    assert sum(len(entry.text) for entry in model.pieces) <= len(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it holds no pieces"),
        (
            varint(1 << 3 | 2) + varint(1 << 60) + b"abc",
            f"field 1 at byte 0 says {1 << 60} bytes, 3 are left",
        ),
        (b"\x0a" + b"\xff" * 11, "a number of more than ten bytes"),
        (b"\x0a\x80", "it ends in the middle of a number"),
        (b"\x0b", "wire type 3 at byte 0"),
        (field(1, 5), "a number (5) where bytes belong"),
        (field(1, field(1, b"\xff")), "piece 0: 'utf-8' codec"),
        (piece(""), "piece 0: its text is ''"),
        (piece("a", float("nan")), "score nan"),
        (piece("a", kind=9), "piece 0: 9 is not a valid PieceType"),
        (piece("a") + field(2, field(3, b"x")), "1 bytes where a number belongs"),
    ],
)
def test_damage_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{path}: not a sentencepiece model: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (piece("a"), "model_type is unigram; only bpe is supported"),
        (piece("a") + BPE + field(3, field(2, b"map")), "precompiled_charsmap"),
        (piece("a") + BPE + field(2, field(24, 1)), "treat_whitespace_as_suffix=True"),
        (piece("a") + piece("a") + BPE, "1 pieces appear twice"),
        (piece("a") + piece("b" * 5000) + BPE, "piece 1 has 5000 characters"),
    ],
)
def test_unsupported_kinds_are_named(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def test_tiktoken_file_is_not_taken_for_one(tmp_path: Path) -> None:
    """Llama 3's original tokenizer.model is text: base64 and a rank a line."""
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(TokenizerError, match=r"tiktoken.*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_sizes_are_not_believed() -> None:
    """A length of 2^60 costs nothing."""
    data = DATA + varint(1 << 3 | 2) + varint(1 << 60)
    tracemalloc.start()
    with pytest.raises(ValueError, match="bytes, 0 are left"):
        parse_sentencepiece_model(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000

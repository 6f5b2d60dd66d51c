"""Decoding: equal to the libraries', streamed or not."""

from __future__ import annotations

import time

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_corpus import TEXTS
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from llm_boost.errors import TokenizerError
from llm_boost.tokenization import Tokenizer
from llm_boost.tokenization.detokenize import Detokenizer

QWEN2_IDS = st.lists(st.integers(0, 620), max_size=60)  # 605 and on have no token
LLAMA_BYTES = st.integers(3, 258)
LLAMA_IDS = st.lists(st.integers(0, 999) | LLAMA_BYTES, max_size=60)


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> tuple[str, list[str]]:
    stream = tokenizer.stream(**options)
    parts = [*map(stream.push, ids), stream.finish()]
    return "".join(parts), parts


@given(QWEN2_IDS, st.booleans())
def test_byte_level_equals_tokenizers(qwen2: Tokenizer, ids: list[int], skip: bool) -> None:
    """Invalid UTF-8 included: most random sequences of byte tokens are."""
    assert qwen2.decode(ids, skip_special_tokens=skip) == qwen2._backend.decode(ids, skip_special_tokens=skip)


@given(LLAMA_IDS)
def test_sentencepiece_equals_sentencepiece(
    llama: Tokenizer, processor: sentencepiece.SentencePieceProcessor, ids: list[int]
) -> None:
    # sentencepiece writes <unk> as " ⁇ ", and keeps a <0x20> at the start (transformers does not).
    ids = [token_id for token_id in ids if token_id not in (0, llama._backend.token_to_id("<0x20>"))]
    assert llama.decode(ids) == processor.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_decodes_texts_as_tokenizers(llama: Tokenizer, text: str) -> None:
    ids = llama.encode(text)
    for skip in (False, True):
        expected = llama._backend.decode(ids, skip_special_tokens=skip)
        assert llama.decode(ids, skip_special_tokens=skip) == expected


@given(QWEN2_IDS, st.booleans())
def test_byte_level_stream_equals_decode(qwen2: Tokenizer, ids: list[int], skip: bool) -> None:
    whole, _ = streamed(qwen2, ids, skip_special_tokens=skip)
    assert whole == qwen2.decode(ids, skip_special_tokens=skip)


@given(LLAMA_IDS, st.booleans())
def test_sentencepiece_stream_equals_decode(llama: Tokenizer, ids: list[int], skip: bool) -> None:
    whole, _ = streamed(llama, ids, skip_special_tokens=skip)
    assert whole == llama.decode(ids, skip_special_tokens=skip)


@given(st.text())
def test_no_half_characters(qwen2: Tokenizer, llama: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    for tokenizer in (qwen2, llama):
        _, parts = streamed(tokenizer, tokenizer.encode(text))
        assert not any("\ufffd" in part for part in parts)


def test_unfinished_character_comes_out_at_the_end(qwen2: Tokenizer) -> None:
    first, second = qwen2.encode("\U0010abcd")[:2]
    stream = qwen2.stream()
    assert [stream.push(first), stream.push(second), stream.finish()] == ["", "", "\ufffd"]


@given(st.integers(0, 40))
def test_stream_after_a_prompt_continues_it(llama: Tokenizer, cut: int) -> None:
    """The space before the first new word stays, and a character begun in the prompt is completed."""
    ids = llama.encode("Hello 世界 and the 😀 lazy dog", add_special_tokens=False)
    cut = min(cut, len(ids))
    stream = llama.stream(after=ids[:cut])
    rest = "".join([*map(stream.push, ids[cut:]), stream.finish()])
    before = llama.stream()
    prompt = "".join(map(before.push, ids[:cut]))
    assert prompt + rest == llama.decode(ids)


def test_streaming_is_linear(qwen2: Tokenizer) -> None:
    """Ten times the tokens take about ten times as long, even if no character is ever completed."""

    def seconds(count: int) -> float:
        stream = qwen2.stream()
        ids = [qwen2.encode("\U0010abcd")[0]] * count
        start = time.perf_counter()
        for token_id in ids:
            stream.push(token_id)
        return time.perf_counter() - start

    small = min(seconds(2_000) for _ in range(5))
    assert min(seconds(20_000) for _ in range(5)) < 40 * small


def test_ids_without_a_token_are_nothing(qwen2: Tokenizer) -> None:
    assert qwen2.decode([100_000, -1, 1 << 40]) == ""


def test_unknown_decoder_is_refused() -> None:
    backend = Backend(models.BPE({"a": 0}, []))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match=r"x\.json: decoder WordPiece is not supported; supported are"):
        Detokenizer(backend, "x.json")

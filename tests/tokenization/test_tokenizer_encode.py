"""Token for token what transformers, or sentencepiece, makes of the corpus."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_corpus import SPECIAL, TEXTS
from tokenizer_gguf import llama_metadata, qwen2_metadata, read_metadata
from tokenizer_goldens import GOLDENS, golden, real_file

from llm_boost.errors import RequestError
from llm_boost.tokenization import Tokenizer, load_tokenizer

REAL = ["smollm2-135m", "qwen2.5-coder-0.5b"]
EXPECTED = golden("expected.json")


def assert_encodes(tokenizer: Tokenizer, expected: list[list[int]]) -> None:
    assert len(expected) == len(TEXTS)
    for text, ids in zip(TEXTS, expected, strict=True):
        assert tokenizer.encode(text) == ids, text


def test_vocab_and_merges_equal_qwen2_tokenizer(qwen2: Tokenizer) -> None:
    assert_encodes(qwen2, EXPECTED["qwen2"])


def test_sentencepiece_model_equals_sentencepiece(llama: Tokenizer) -> None:
    assert_encodes(llama, EXPECTED["llama"])


def test_sentencepiece_model_not_legacy_equals_llama_tokenizer() -> None:
    tokenizer = load_tokenizer(GOLDENS / "llama", overrides={"legacy": False})
    assert_encodes(tokenizer, EXPECTED["llama_not_legacy"])


def test_gguf_byte_level_equals_qwen2_tokenizer() -> None:
    assert_encodes(Tokenizer.from_gguf(qwen2_metadata()), EXPECTED["qwen2"])


def test_gguf_sentencepiece_equals_sentencepiece(processor: sentencepiece.SentencePieceProcessor) -> None:
    assert_encodes(Tokenizer.from_gguf(llama_metadata(processor)), EXPECTED["llama"])


@given(st.text().filter(lambda text: not re.search("<(unk|s|/s)>", text)))
def test_any_text_equals_sentencepiece(
    llama: Tokenizer, processor: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert llama.encode(text, add_special_tokens=False) == processor.encode(text)


@given(st.text(alphabet=" ab▁\n是", max_size=30))
def test_any_spacing_equals_sentencepiece(
    llama: Tokenizer, processor: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert llama.encode(text, add_special_tokens=False) == processor.encode(text)


@pytest.mark.parametrize("extra_whitespaces", [False, True])
@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_sentencepiece_normaliser_flags(tmp_path: Path, extra_whitespaces: bool, dummy_prefix: bool) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b  c aa bb cc ab bc"] * 4),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=270,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=not extra_whitespaces,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in ["", " ", "a", "a b", " a", "  a  b   c  ", "a\n b", "\ta \t b", "aab  bcc "]:
        ids = processor.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.decode(ids) == processor.decode(ids), text


@given(st.text())
def test_byte_level_round_trip(text: str) -> None:
    """Whatever the text, no byte of it is lost (GPT-2's pre-tokenizer does not normalise)."""
    tokenizer = _gpt2()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def _gpt2(cache: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006
    if not cache:
        cache.append(Tokenizer.from_gguf({**qwen2_metadata(), "tokenizer.ggml.pre": "gpt-2"}))
    return cache[0]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["AB", "Ġ12345", "Ġit", "'s", "Ġ", "Ġx"]),
        ("smollm", ["AB", "Ġ", "1", "2", "3", "4", "5", "Ġit", "'s", "Ġ", "Ġx"]),
        ("qwen2", ["AB", "Ġ", "1", "2", "3", "4", "5", "Ġit", "'s", "Ġ", "Ġx"]),
        ("llama-bpe", ["AB", "Ġ", "123", "45", "Ġit", "'s", "Ġ", "Ġx"]),
        ("default", ["AB", "Ġ", "123", "45", "Ġit", "'", "s", "Ġ", "Ġx"]),
    ],
)
def test_families_cut_words_their_own_way(pre: str, words: list[str]) -> None:
    tokenizer = Tokenizer.from_gguf({**qwen2_metadata(), "tokenizer.ggml.pre": pre})
    cut = tokenizer._backend.pre_tokenizer.pre_tokenize_str("AB 12345 it's  x")
    assert [word for word, _ in cut] == words


def test_llama3_takes_whole_words_whatever_the_merges() -> None:
    metadata = qwen2_metadata()
    metadata["tokenizer.ggml.tokens"].append("zqzq")
    metadata["tokenizer.ggml.token_type"].append(1)
    assert Tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": "llama-bpe"}).encode("zqzq") == [605]
    assert 605 not in Tokenizer.from_gguf(metadata).encode("zqzq")


def test_half_a_surrogate_pair_is_the_requests_fault(qwen2: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"U\+D83D at character 2"):
        qwen2.encode("ab\ud83d")


def test_bos_can_be_left_out(llama: Tokenizer) -> None:
    assert llama.encode("a") == [1, *llama.encode("a", add_special_tokens=False)]


def test_special_tokens_inside_text_are_seen(qwen2: Tokenizer, llama: Tokenizer) -> None:
    assert 602 in qwen2.encode(SPECIAL[0])
    assert llama.encode("<s>")[1:] == [1]


@pytest.mark.models
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizer_json_equals_transformers(name: str) -> None:
    expected = golden("real.json")[name]
    tokenizer = load_tokenizer(real_file(name))
    assert_encodes(tokenizer, expected["ids"])
    for chat in expected["chats"]:
        assert tokenizer.apply_chat_template(**chat["options"]) == chat["text"]


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "file"),
    [(REAL[0], "smollm2-135m-q4_1.gguf"), (REAL[1], "qwen2.5-coder-0.5b-q4_k_m.gguf")],
)
def test_real_gguf_equals_transformers(name: str, file: str) -> None:
    expected = golden("real.json")[name]
    tokenizer = Tokenizer.from_gguf(read_metadata(real_file(file)))
    assert_encodes(tokenizer, expected.get("gguf_ids", expected["ids"]))
    directory = load_tokenizer(real_file(name))
    assert tokenizer.chat_template == directory.chat_template
    assert tokenizer.eos_token_ids == directory.eos_token_ids
    assert tokenizer.vocab_size == directory.vocab_size


@pytest.mark.models
def test_real_vocab_and_merges_equal_qwen2_tokenizer(tmp_path: Path) -> None:
    """The real vocabulary, taken apart into the files of the same content."""
    name = REAL[1]
    folder = real_file(name)
    whole = json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"]: token for token in whole["added_tokens"]}
    vocab = {token: index for token, index in whole["model"]["vocab"].items() if index < min(added)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = "".join(f"{left} {right}\n" for left, right in whole["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(index): {key: value for key, value in token.items() if key != "id"}
        for index, token in added.items()
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(folder / "chat_template.jinja", tmp_path)
    assert_encodes(load_tokenizer(tmp_path), golden("real.json")[name]["ids"])

"""A tokenizer crosses into GGUF metadata and back, and gives the same ids all the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tokenization"))

from tokenizer_corpus import TEXTS
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from golden import model_dir
from llm_boost.errors import TokenizerError
from llm_boost.tokenization import Tokenizer, load_tokenizer
from llm_boost.tokenization.export import gguf_metadata, huggingface_files

GOLDENS = Path(__file__).parent.parent / "goldens" / "tokenizers"
FOLDERS = {
    "qwen2": GOLDENS / "qwen2",
    "sentencepiece": GOLDENS / "llama",
    "tokenizer.json": model_dir("llama3"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_the_same_in_gguf_and_back(tmp_path, name):
    source = load_tokenizer(FOLDERS[name])
    metadata = gguf_metadata(source, source.vocab_size + 3)  # an embedding with rows to spare
    inside = Tokenizer.from_gguf(metadata)
    for file, text in huggingface_files(metadata, "m.gguf", 128).items():
        (tmp_path / file).write_text(text)
    back = load_tokenizer(tmp_path)
    assert back.vocab_size == source.vocab_size
    for text in TEXTS:
        assert inside.encode(text) == source.encode(text), text
        assert back.encode(text) == source.encode(text), text
        ids = source.encode(text)
        assert back.decode(ids) == source.decode(ids)
    for role in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "eos_token_ids"):
        assert getattr(back, role) == getattr(source, role)
    assert back.chat_template == source.chat_template


def test_what_the_file_says(tmp_path):
    metadata = gguf_metadata(load_tokenizer(FOLDERS["qwen2"]), 700)
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    assert len(metadata["tokenizer.ggml.tokens"]) == 700 == len(metadata["tokenizer.ggml.token_type"])
    assert metadata["tokenizer.ggml.tokens"][699] == "[PAD699]"
    assert metadata["tokenizer.ggml.token_type"][699] == 5
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    sentencepiece = gguf_metadata(load_tokenizer(FOLDERS["sentencepiece"]), 1000)
    assert sentencepiece["tokenizer.ggml.model"] == "llama"
    assert sentencepiece["tokenizer.ggml.add_bos_token"] is True
    assert sentencepiece["tokenizer.ggml.add_space_prefix"] is True
    tokens = sentencepiece["tokenizer.ggml.tokens"]
    types = dict(zip(tokens, sentencepiece["tokenizer.ggml.token_type"], strict=True))
    assert [types[token] for token in ("<unk>", "<s>", "<0x41>", "▁t")] == [2, 3, 6, 1]


def tokenizer_json(folder: Path, **changes: object) -> Path:
    spec = json.loads((model_dir("llama") / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**spec, **changes}))
    return folder


def test_what_llama_cpp_could_not_read_is_refused(tmp_path):
    def refused(folder: Path, rows: int = 1000) -> str:
        with pytest.raises(TokenizerError) as caught:
            gguf_metadata(load_tokenizer(folder), rows)
        assert str(caught.value).startswith(str(folder))
        return str(caught.value)

    assert "tokens, the embedding has 100 rows" in refused(model_dir("llama"), 100)
    regex = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
    assert "llama.cpp has no name for its way to cut text, ['a+']" in refused(
        tokenizer_json(tmp_path, pre_tokenizer=regex)
    )
    assert "cannot cut text as the pre-tokenizer Whitespace does" in refused(
        tokenizer_json(tmp_path, pre_tokenizer={"type": "Whitespace"})
    )
    assert "llama.cpp cannot normalise text by NFKC" in refused(
        tokenizer_json(tmp_path, normalizer={"type": "NFKC"})
    )
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert "its model is WordLevel; GGUF output is supported for BPE" in refused(tmp_path)


def test_merges_that_no_scores_stand_for_are_refused(tmp_path):
    vocab = {token: i for i, token in enumerate(["<unk>", "a", "b", "c", "ab", "bc", "abc"])}
    right = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]

    def scores(merges: list[tuple[str, str]]) -> list[float]:
        backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
        spaces = decoders.Replace("▁", " ")
        backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
        backend.save(str(tmp_path / "tokenizer.json"))
        return gguf_metadata(load_tokenizer(tmp_path), 7)["tokenizer.ggml.scores"]

    assert scores(right)[4] > scores(right)[5] > scores(right)[6]
    for merges in (right[:3], [right[2], *right[:2], right[3]]):  # one left out; abc before others and after
        with pytest.raises(TokenizerError, match="its merges do not follow from scores"):
            scores(merges)

"""Which files are read, what beside them counts, and what damaged ones lead to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizer_gguf import qwen2_metadata
from tokenizer_goldens import GOLDENS

from llm_boost.errors import TokenizerError
from llm_boost.tokenization import Tokenizer, load_tokenizer

CHATML_YAML = {
    "type": "Qwen2Tokenizer",
    "model_max_length": 4096,
    "unk_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "chat_template": "{{ messages[0].content }}",
}


@pytest.fixture
def qwen2_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDENS / "qwen2", tmp_path / "qwen2"))


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama"))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` takes one out."""
    value = json.loads(path.read_text()) if path.exists() else {}
    value.update(changes)
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not ...}))


def save_tokenizer_json(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


# ---- which files ----


def test_tokenizer_json_comes_first(llama_dir: Path, qwen2: Tokenizer) -> None:
    save_tokenizer_json(qwen2, llama_dir)
    assert load_tokenizer(llama_dir).encode("a b 你") == qwen2.encode("a b 你")


def test_vocabulary_as_argument(tmp_path: Path, qwen2: Tokenizer, llama: Tokenizer) -> None:
    """--vocab_file alone, or with --merges_file, needs nothing in the model directory."""
    empty = tmp_path / "model"
    empty.mkdir()
    vocab, merges = GOLDENS / "qwen2" / "vocab.json", GOLDENS / "qwen2" / "merges.txt"
    whole = save_tokenizer_json(qwen2, tmp_path / "json")
    text = "Hello 世界<|im_end|>"
    for tokenizer in (
        load_tokenizer(empty, vocab_file=vocab, merges_file=merges),
        load_tokenizer(empty, vocab_file=vocab),
        load_tokenizer(empty, vocab_file=GOLDENS / "qwen2"),
        load_tokenizer(empty, vocab_file=whole),
        load_tokenizer(empty, overrides={"vocab_file": str(vocab), "merges_file": str(merges)}),
        load_tokenizer(GOLDENS / "qwen2", merges_file=merges),
    ):
        assert tokenizer.encode(text) == qwen2.encode(text)
    for file in (GOLDENS / "llama" / "tokenizer.model", GOLDENS / "llama"):
        assert load_tokenizer(empty, vocab_file=file).encode(text) == llama.encode(text)


def test_a_vocabulary_may_have_the_token_model(qwen2_dir: Path) -> None:
    """ "model" is a key of a tokenizer.json, too."""
    vocab = json.loads((qwen2_dir / "vocab.json").read_text())
    vocab["model"] = vocab.pop(next(token for token, i in vocab.items() if i == len(vocab) - 1))
    (qwen2_dir / "vocab.json").write_text(json.dumps(vocab))
    (qwen2_dir / "merges.txt").write_text("#version: 0.2\n")
    assert load_tokenizer(qwen2_dir, vocab_file=qwen2_dir / "vocab.json").encode("mod") == [
        vocab[character] for character in "mod"
    ]


def test_argument_beats_override(llama: Tokenizer) -> None:
    model = GOLDENS / "llama" / "tokenizer.model"
    tokenizer = load_tokenizer(GOLDENS, vocab_file=model, overrides={"vocab_file": "/path/vocab.json"})
    assert tokenizer.encode("a") == llama.encode("a")


def test_qwen2_without_a_configuration_knows_its_special_tokens(qwen2_dir: Path) -> None:
    (qwen2_dir / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(qwen2_dir)
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [600, 601, 602]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (600, 600, None)
    assert tokenizer.vocab_size == 603


# ---- the settings beside them ----


def test_sentencepiece_names_its_own_special_tokens(llama: Tokenizer) -> None:
    assert (llama.bos_token_id, llama.eos_token_id, llama.unk_token_id, llama.pad_token_id) == (1, 2, 0, None)
    assert llama.eos_token_ids == {2}


def test_yaml_overrides(qwen2_dir: Path) -> None:
    edit(qwen2_dir / "tokenizer_config.json", eos_token="<|endoftext|>", chat_template="no")
    tokenizer = load_tokenizer(qwen2_dir, overrides=CHATML_YAML)
    assert (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (600, 602, 600)
    assert tokenizer.model_max_length == 4096
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "x"


def test_all_ends_of_a_text(qwen2_dir: Path) -> None:
    edit(qwen2_dir / "config.json", eos_token_id=604)
    edit(qwen2_dir / "generation_config.json", eos_token_id=[602, 600])
    tokenizer = load_tokenizer(qwen2_dir)
    assert tokenizer.eos_token_id == 602
    assert tokenizer.eos_token_ids == {600, 602, 604}


def test_end_of_text_from_the_model_where_the_tokenizer_names_none(qwen2_dir: Path) -> None:
    edit(qwen2_dir / "tokenizer_config.json", eos_token=None)
    edit(qwen2_dir / "generation_config.json", eos_token_id=[601, 600])
    assert load_tokenizer(qwen2_dir).eos_token_id == 601


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_bos_and_eos_by_configuration(llama_dir: Path, add_bos: bool, add_eos: bool) -> None:
    edit(llama_dir / "tokenizer_config.json", add_bos_token=add_bos, add_eos_token=add_eos)
    tokenizer = load_tokenizer(llama_dir)
    middle = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == [1] * add_bos + middle + [2] * add_eos


def test_tokenizer_json_decides_on_bos_unless_overridden(tmp_path: Path, llama: Tokenizer) -> None:
    folder = save_tokenizer_json(llama, tmp_path / "x").parent
    edit(folder / "tokenizer_config.json", bos_token="<s>", eos_token="</s>", add_bos_token=False)
    assert load_tokenizer(folder).encode("a")[0] == 1
    assert load_tokenizer(folder, overrides={"add_bos_token": False}).encode("a")[0] != 1


def test_added_tokens_keep_their_ids(qwen2_dir: Path, llama_dir: Path) -> None:
    """Ids may leave gaps, take a placeholder's place, or come from the older added_tokens.json."""
    config = json.loads((qwen2_dir / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["700"] = {"content": "<far>", "special": False}
    edit(qwen2_dir / "tokenizer_config.json", **config)
    tokenizer = load_tokenizer(qwen2_dir)
    assert tokenizer.encode("a<far>")[-1] == 700
    assert tokenizer.vocab_size == 701
    assert tokenizer.decode([700]) == "<far>"

    edit(llama_dir / "added_tokens.json", **{"<|im_end|>": 1000})
    edit(llama_dir / "special_tokens_map.json", eos_token={"content": "<|im_end|>"}, pad_token="</s>")
    tokenizer = load_tokenizer(llama_dir)
    assert (tokenizer.encode("a<|im_end|>")[-1], tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        1000,
        1000,
        2,
    )
    assert tokenizer.decode([1000]) == ""

    (llama_dir / "added_tokens.json").unlink()
    (llama_dir / "special_tokens_map.json").unlink()
    edit(
        llama_dir / "tokenizer_config.json",
        added_tokens_decoder={"999": {"content": "[TOOL]", "special": True}},
    )
    assert load_tokenizer(llama_dir).encode("[TOOL]", add_special_tokens=False) == [999]


def test_tokens_with_a_role_that_the_vocabulary_lacks_are_added(llama_dir: Path) -> None:
    edit(llama_dir / "tokenizer_config.json", pad_token="[PAD]", additional_special_tokens=["<x>"])
    tokenizer = load_tokenizer(llama_dir)
    assert tokenizer.pad_token_id == 1000
    assert tokenizer.encode("<x>", add_special_tokens=False) == [1001]


def test_qwen2_class_normalises_even_if_tokenizer_json_does_not(tmp_path: Path, qwen2: Tokenizer) -> None:
    path = save_tokenizer_json(qwen2, tmp_path / "x")
    edit(path, normalizer=None)
    assert load_tokenizer(path.parent).encode("e\u0301") != qwen2.encode("é")
    edit(path.parent / "tokenizer_config.json", tokenizer_class="Qwen2TokenizerFast")
    assert load_tokenizer(path.parent).encode("e\u0301") == qwen2.encode("é")


def test_truncation_in_tokenizer_json_is_not_ours(tmp_path: Path, qwen2: Tokenizer) -> None:
    path = save_tokenizer_json(qwen2, tmp_path / "x")
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit(path, truncation=truncation)
    assert len(load_tokenizer(path.parent).encode("a b c d e f")) > 2


def test_chat_templates(qwen2_dir: Path) -> None:
    config = qwen2_dir / "tokenizer_config.json"
    edit(config, chat_template="text")
    assert load_tokenizer(qwen2_dir).chat_template == "text"
    edit(config, chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert load_tokenizer(qwen2_dir).chat_template == "d"
    (qwen2_dir / "chat_template.jinja").write_text("file\n")
    (qwen2_dir / "additional_chat_templates").mkdir()
    (qwen2_dir / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = load_tokenizer(qwen2_dir)
    assert tokenizer.chat_template == "file\n"
    assert tokenizer.apply_chat_template([], chat_template="rag") == "rag"


def test_no_limit_on_length(qwen2_dir: Path) -> None:
    edit(qwen2_dir / "tokenizer_config.json", model_max_length=1000000000000000019884624838656)
    assert load_tokenizer(qwen2_dir).model_max_length is None


# ---- damage: one line, with the file's name ----


def assert_refused(folder: Path, *words: str, **options: Any) -> None:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_nothing_there(tmp_path: Path) -> None:
    assert_refused(tmp_path / "missing", "missing: no such directory")
    assert_refused(
        tmp_path, str(tmp_path), "no tokenizer.json, vocab.json with merges.txt, or tokenizer.model"
    )
    assert_refused(tmp_path, "nothing.json: no such file", vocab_file=tmp_path / "nothing.json")
    shutil.copy(GOLDENS / "qwen2" / "vocab.json", tmp_path)
    assert_refused(tmp_path, "no merges.txt")
    assert_refused(tmp_path, "give merges_file", vocab_file=tmp_path / "vocab.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\xfd",
        b"[1]",
        b"null",
        b'{"model": null}',
        b'{"version": "1.0", "model": {"type": "BPE"}}',
    ],
)
def test_damaged_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert_refused(tmp_path, str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    "change",
    [
        {"vocab": {"a": -1}},
        {"vocab": {"a": "b"}},
        {"merges": [["zz", "yy"]]},
        {"continuing_subword_prefix": "##"},  # the library panics
    ],
)
def test_damaged_model_in_tokenizer_json(tmp_path: Path, qwen2: Tokenizer, change: dict[str, Any]) -> None:
    path = save_tokenizer_json(qwen2, tmp_path)
    model = json.loads(path.read_text())["model"]
    edit(path, model={**model, **change})
    assert_refused(tmp_path, str(path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("vocab.json", "not json", ["vocab.json: not JSON"]),
        ("vocab.json", "[]", ["vocab.json: it must hold a JSON object"]),
        ("vocab.json", '{"a": 1.5}', ["vocab.json: 'a': 1.5 is not a token id"]),
        ("vocab.json", '{"a": -1}', ["vocab.json: 'a': -1 is not a token id"]),
        ("vocab.json", "[" * 100_000, ["vocab.json: not JSON"]),
        ("merges.txt", "#version: 0.2\nt h\nx\n", ["merges.txt: line 3 is 'x'"]),
        ("merges.txt", "a b c\n", ["merges.txt: line 1"]),
        ("merges.txt", "zz yy\n", ["merges.txt", "zz", "out of vocabulary"]),
        ("tokenizer_config.json", "{", ["tokenizer_config.json: not JSON"]),
        ("tokenizer_config.json", '{"eos_token": 7}', ["tokenizer_config.json: eos_token: 7"]),
        (
            "tokenizer_config.json",
            '{"add_bos_token": "yes"}',
            ["add_bos_token: 'yes', it must be of type bool"],
        ),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "BertTokenizer"}',
            ["vocab.json", "not BertTokenizer"],
        ),
        ("tokenizer_config.json", '{"tokenizer_class": 1}', ["tokenizer_class: 1"]),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', ["added_tokens_decoder must be an object"]),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', ["added_tokens_decoder.x"]),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"99999999999": {"content": "a"}}}',
            ["added_tokens_decoder.99999999999", "is not a token id"],
        ),
        ("tokenizer_config.json", '{"chat_template": 1}', ["chat_template must be a text or a list"]),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": 1}]}',
            ["chat_template must be a text or a list"],
        ),
        ("tokenizer_config.json", '{"model_max_length": -5}', ["model_max_length: -5"]),
        ("tokenizer_config.json", '{"additional_special_tokens": "x"}', ["additional_special_tokens"]),
        ("chat_template.jinja", "\udcff", ["chat_template.jinja: not UTF-8 at byte 0"]),
        ("generation_config.json", '{"eos_token_id": "2"}', ["generation_config.json: eos_token_id: '2'"]),
        ("config.json", '{"eos_token_id": [true]}', ["config.json: eos_token_id: True"]),
    ],
)
def test_damaged_files(qwen2_dir: Path, name: str, content: str, words: list[str]) -> None:
    (qwen2_dir / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert_refused(qwen2_dir, str(qwen2_dir), *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"eos_tokn": "x"}, "processor.tokenizer.eos_tokn: unknown key; did you mean eos_token?"),
        ({"eos_token": "<nope>"}, "processor.tokenizer.eos_token: '<nope>' is not in the vocabulary of"),
        ({"eos_token": 3}, "processor.tokenizer.eos_token: 3, it must be the text of a token"),
        ({"chat_template": 3}, "processor.tokenizer.chat_template: 3"),
        ({"model_max_length": "4k"}, "processor.tokenizer.model_max_length: '4k'"),
        ({"vocab_file": "/path/vocab.json"}, "/path/vocab.json: no such file"),
        ({"type": "LlamaTokenizer"}, "not LlamaTokenizer"),
    ],
)
def test_wrong_overrides(qwen2_dir: Path, overrides: dict[str, Any], words: str) -> None:
    assert_refused(qwen2_dir, words, overrides=overrides)


def test_added_token_without_room(tmp_path: Path, qwen2: Tokenizer) -> None:
    save_tokenizer_json(qwen2, tmp_path)
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder={"900": {"content": "<far>"}})
    assert_refused(tmp_path, "added_tokens_decoder.900 is '<far>'", "no room at that id")


# ---- GGUF metadata ----


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model", None, "tokenizer.ggml.model is missing"),
        (
            "model",
            "bert",
            "tokenizer.ggml.model is 'bert'; supported are gpt2 (BPE) and llama (sentencepiece)",
        ),
        (
            "pre",
            "new-thing",
            "pre is 'new-thing'; supported pre-tokenizers are deepseek-r1-qwen, default, gpt-2, l",
        ),
        ("tokens", None, "tokenizer.ggml.tokens is missing"),
        ("tokens", "abc", "tokenizer.ggml.tokens is a str, it must be a list"),
        ("tokens", ["a", 1], "tokenizer.ggml.tokens[1] is 1, it must be a str"),
        ("token_type", [1], "token_type has 1 entries for 605 tokens"),
        ("merges", ["ab"], "tokenizer.ggml.merges[0] is 'ab'"),
        ("merges", ["zz yy"], "out of vocabulary"),
        ("eos_token_id", 99999, "tokenizer.ggml.eos_token_id is 99999, there are 605 tokens"),
        ("eos_token_id", True, "tokenizer.ggml.eos_token_id is a bool, it must be a int"),
        ("add_bos_token", 1, "tokenizer.ggml.add_bos_token is a int"),
    ],
)
def test_damaged_gguf_metadata(key: str, value: Any, words: str) -> None:
    metadata = qwen2_metadata()
    metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_gguf(metadata)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gguf_boundaries_and_templates() -> None:
    metadata = {
        **qwen2_metadata(),
        "tokenizer.ggml.bos_token_id": 601,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.eot_token_id": 600,
        "tokenizer.chat_template": "d",
        "tokenizer.chat_template.tool_use": "t",
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("a") == [601, *tokenizer.encode("a", add_special_tokens=False), 602]
    assert tokenizer.eos_token_ids == {602, 600}
    assert tokenizer.chat_template == "d"
    assert tokenizer.apply_chat_template([], tools=[{}]) == "t"


def test_gguf_llama3_begins_with_bos_by_default() -> None:
    metadata = {**qwen2_metadata(), "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 601}
    assert Tokenizer.from_gguf(metadata).encode("a")[0] == 601

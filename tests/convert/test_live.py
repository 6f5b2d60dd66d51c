"""Outputs beside the programs they are for: transformers, llama.cpp and MindSpore load and agree."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from convert_samples import config_of, random_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tokenization"))

from tokenizer_corpus import TEXTS

from golden import GOLDEN_MODELS, load_golden, mean_kl, model_dir, relative_error
from llm_boost.checkpoint import open_checkpoint
from llm_boost.checkpoint.mindformers_names import mindformers_name
from llm_boost.convert.convert import Options, convert
from llm_boost.convert.source import open_source

GOLDENS = Path(__file__).parent.parent / "goldens"


def converted(source: Path, target: Path, to: str, **options: object) -> Path:
    return convert(open_source(source), target, Options(to, **options)).path  # type: ignore[arg-type]


@pytest.mark.reference
@pytest.mark.parametrize("way", ["hf", "mindspore-ckpt", "gguf"])
@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_transformers_loads_what_came_back(tmp_path, name, way):
    """Also out of a GGUF file, with everything beside the weights made from its metadata."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    there = converted(model_dir(name), tmp_path / "m", way, dtype="fp32")
    back = converted(there, tmp_path / "back", "hf", max_shard_size=60_000)
    model = AutoModelForCausalLM.from_pretrained(
        back, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    golden = load_golden(name, 17)
    with torch.inference_mode():
        logits = model(torch.tensor([golden.prompt])).logits[0].numpy()
    assert relative_error(logits[-len(golden.logits) :], golden.logits) < 1e-5
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (model_dir(name), back))
    for text in ("Hello, world! ", "<|im_start|>user\nçà 你好<|im_end|>", "  a\n\n b\t1234"):
        assert theirs.encode(text) == ours.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(
        messages, tokenize=False
    )


@pytest.mark.llama_cpp
@pytest.mark.parametrize(("kind", "kl"), [("F32", 1e-5), ("F16", 1e-5), ("BF16", 1e-3), ("Q8_0", 0.03)])
@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3", "mistral"])
def test_llama_cpp_computes_the_same(tmp_path, load_runner, family, kind, kl):
    """Its logits beside ours in float32; its cache is float16, its activations are int8 for Q8_0."""
    from llama_cpp import Llama

    from golden import Sequences

    golden = load_golden(family, 17)
    path = converted(model_dir(family), tmp_path / "m.gguf", "gguf", gguf_type=kind)
    llama = Llama(str(path), n_ctx=64, n_threads=1, verbose=False, logits_all=True)
    llama.eval(golden.prompt)
    theirs = np.array(llama.scores[: len(golden.prompt)], np.float32)
    ours = Sequences(load_runner(family, "float32"), [golden.prompt]).forward({0: golden.prompt})[0]
    assert mean_kl(theirs, ours) < kl
    if kind == "F32":
        assert theirs.argmax(-1).tolist() == ours.argmax(-1).tolist()
        assert llama.tokenize(b"Hello <|im_end|>", add_bos=False, special=True) == _ids(
            family, "Hello <|im_end|>"
        )


def _ids(family: str, text: str) -> list[int]:
    from llm_boost.tokenization import load_tokenizer

    return load_tokenizer(model_dir(family)).encode(text, add_special_tokens=False)


@pytest.mark.llama_cpp
def test_llama_cpp_cuts_text_as_sentencepiece_does(tmp_path):
    """Scores made from ranks of merges serve as the original's."""
    from llama_cpp import Llama

    from llm_boost.tokenization import load_tokenizer

    source = random_model(tmp_path / "m", config_of(vocab_size=1000))
    for file in source.glob("tokenizer*"):
        file.unlink()
    shutil.copy(GOLDENS / "tokenizers" / "llama" / "tokenizer.model", source)
    path = converted(source, tmp_path / "m.gguf", "gguf")
    llama = Llama(str(path), n_ctx=64, n_threads=1, verbose=False, vocab_only=True)
    tokenizer = load_tokenizer(source)
    for text in TEXTS:
        if "\0" not in text and text:
            assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text), text


@pytest.mark.mindspore
@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_mindspore_loads_ours_and_we_load_its(tmp_path, form):
    import mindspore

    source = random_model(tmp_path / "source", config_of("qwen2"), "BF16")
    path = converted(source, tmp_path / "m", f"mindspore-{form}")
    loaded = mindspore.load_checkpoint(str(path), format=form)
    before = open_checkpoint(source)
    assert set(loaded) == {mindformers_name(name, "qwen2") for name in before.tensors}
    for name in before.tensors:
        theirs = loaded[mindformers_name(name, "qwen2")].float().asnumpy()
        np.testing.assert_array_equal(theirs, before.read(name).astype(np.float32))
    own = tmp_path / "theirs" / f"m.{form}"
    own.parent.mkdir()
    (own.parent / "config.json").write_text(json.dumps(before.config))
    mindspore.save_checkpoint([{"name": k, "data": v} for k, v in loaded.items()], str(own), format=form)
    back = open_checkpoint(own)
    for name in before.tensors:
        assert back.read(name).tobytes() == before.read(name).tobytes()

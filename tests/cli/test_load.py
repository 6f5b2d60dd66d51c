"""From a configuration to what LLM is asked for, on checkpoints that hold nothing but their shape."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_boost.cli.load import build_llm
from llm_boost.config.llm_boost_yaml import read_llm_boost_yaml
from llm_boost.config.run_config import resolve
from llm_boost.errors import CheckpointError, ConfigError

YAML = """
model:
  model_config:
    type: LlmBoostConfig
    boost_model_name: Llama
    hidden_size: 8
    seq_length: 64
    block_size: 16
    num_blocks: 9
processor: {tokenizer: {type: LlamaTokenizer, bos_token: <s>}}
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16, "vocab_size": 10,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """The keyword arguments of each LLM made."""
    made = []
    monkeypatch.setattr("llm_boost.engine.llm.LLM", lambda **arguments: made.append(arguments))
    return made


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"model.norm.weight": np.ones(8, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def yaml_config(tmp_path):
    path = tmp_path / "predict.yaml"
    path.write_text(YAML)
    return read_llm_boost_yaml(path)


def load(yaml_config, **flags):
    return build_llm(resolve(flags, yaml_config, {}))


def test_the_engine_is_asked_for_what_the_file_and_the_flags_say(asked, checkpoint, yaml_config, tmp_path):
    load(yaml_config, model=str(checkpoint), dtype="int8", threads=2, seed=5, cache_dir=str(tmp_path))
    assert asked[0].pop("hf_config")["hidden_size"] == 8
    progress = asked[0].pop("progress")
    assert callable(progress)
    assert asked == [
        {
            "model": checkpoint, "dtype": "int8", "max_model_len": 64, "threads": 2, "seed": 5,
            "cache_dir": tmp_path, "block_size": 16, "num_blocks": 9, "kv_cache_memory": None,
            "kv_cache_dtype": "auto", "speculative_config": None, "vocab_file": None, "merges_file": None, "src_strategy": None,
            "tokenizer_overrides": {"type": "LlamaTokenizer", "bos_token": "<s>"},
        }
    ]  # fmt: skip


def test_a_shape_that_contradicts_config_json(asked, checkpoint, yaml_config):
    (checkpoint / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 16}))
    with pytest.raises(ConfigError, match=r"hidden_size is 8, but .*config.json: hidden_size is 16"):
        load(yaml_config, model=str(checkpoint))
    assert asked == []


def test_without_a_file_the_checkpoint_is_left_to_the_engine(asked, checkpoint):
    load(None, model=str(checkpoint))
    assert asked[0]["tokenizer_overrides"] is None
    assert asked[0]["max_model_len"] is None


def test_a_gguf_keeps_its_own_tokenizer(asked, checkpoint, yaml_config, monkeypatch):
    monkeypatch.setattr("llm_boost.backends.builtin._check_against_checkpoint", lambda *args: None)
    gguf = checkpoint / "model.gguf"
    gguf.touch()
    resolved = resolve({"model": str(gguf)}, yaml_config, {})
    build_llm(resolved)
    assert asked[0]["tokenizer_overrides"] is None
    assert "without effect: the GGUF file holds its own tokenizer" in resolved.notes[-1]


def test_a_directory_without_a_model(asked, tmp_path):
    with pytest.raises(CheckpointError, match="the model directory is empty"):
        load(None, model=str(tmp_path))

"""The YAML's shape beside config.json's."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_boost.config.llm_boost_yaml import read_llm_boost_yaml
from llm_boost.config.shapes import check_shapes, contradictions, to_hf_config
from llm_boost.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "vocab_size": 152064,
}  # fmt: skip
LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "vocab_size": 32000,
}  # fmt: skip


@pytest.fixture
def qwen():
    return read_llm_boost_yaml(CONFIGS / "predict_qwen2_7b_instruct_llm_boost.yaml")


@pytest.fixture
def llama():
    return read_llm_boost_yaml(CONFIGS / "predict_llama2_7b_llm_boost.yaml")


@pytest.fixture
def with_rope(tmp_path):
    def with_rope(extend_method: str, factor: float):
        text = (CONFIGS / "predict_llama2_7b_llm_boost.yaml").read_text()
        text = text.replace('extend_method: "None"', f"extend_method: {extend_method}")
        path = tmp_path / "rope.yaml"
        path.write_text(text.replace("scaling_factor: 1.0", f"scaling_factor: {factor}"))
        return read_llm_boost_yaml(path)

    return with_rope


def test_the_shipped_files_agree_with_their_models(qwen, llama):
    assert contradictions(qwen, QWEN2_7B) == []
    assert contradictions(llama, LLAMA2_7B) == []


def test_transformers_5_keeps_theta_in_rope_parameters(qwen):
    config = {**QWEN2_7B, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}
    del config["rope_theta"]
    assert contradictions(qwen, config) == []
    config["rope_parameters"]["rope_theta"] = 10000.0
    assert [c.key for c in contradictions(qwen, config)] == ["theta"]


def test_a_float32_epsilon_is_equal(llama):
    assert contradictions(llama, {**LLAMA2_7B, "rms_norm_eps": 9.999999747378752e-06}) == []
    assert [c.key for c in contradictions(llama, {**LLAMA2_7B, "rms_norm_eps": 1e-6})] == ["rms_norm_eps"]


@pytest.mark.parametrize(
    ("key", "hf_key"),
    [
        ("hidden_size", "hidden_size"),
        ("num_layers", "num_hidden_layers"),
        ("num_heads", "num_attention_heads"),
        ("n_kv_heads", "num_key_value_heads"),
        ("vocab_size", "vocab_size"),
        ("intermediate_size", "intermediate_size"),
        ("max_position_embedding", "max_position_embeddings"),
    ],
)
def test_each_contradiction_shows_both_values_and_both_files(qwen, key, hf_key):
    hf_path = Path("model/config.json")
    with pytest.raises(ConfigError) as caught:
        check_shapes(qwen, {**QWEN2_7B, hf_key: 7}, hf_path)
    message = str(caught.value)
    assert f"{qwen.path}: model.model_config.{key} is {getattr(qwen.model, key)}" in message
    assert f"{hf_path}: {hf_key} is 7" in message


def test_another_family_is_a_contradiction(qwen):
    with pytest.raises(
        ConfigError, match=r"boost_model_name is 'Qwen', but .*architectures is 'LlamaForCausalLM'"
    ):
        check_shapes(qwen, LLAMA2_7B, Path("config.json"))


@pytest.mark.parametrize(
    ("method", "factor", "hf", "keys"),
    [
        ("None", 1.0, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["extend_method"]),
        ("PI", 2.0, {"rope_scaling": {"type": "linear", "factor": 2.0}}, []),
        ("PI", 2.0, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, ["scaling_factor"]),
        ("PI", 2.0, {"rope_scaling": None}, ["extend_method"]),
        ("PI", 1.0, {"rope_scaling": None}, []),
        ("NTK", 4.0, {"rope_theta": 40000.0}, []),
        ("NTK", 4.0, {"rope_theta": 10000.0}, ["theta"]),
    ],
)
def test_rope(with_rope, method, factor, hf, keys):
    assert [c.key for c in contradictions(with_rope(method, factor), {**LLAMA2_7B, **hf})] == keys


def test_a_config_for_a_checkpoint_that_has_none(qwen, llama):
    made = to_hf_config(qwen)
    assert made["architectures"] == ["Qwen2ForCausalLM"]
    assert {key: made[key] for key in QWEN2_7B} == QWEN2_7B
    assert {key: to_hf_config(llama)[key] for key in LLAMA2_7B} == LLAMA2_7B


def test_the_config_made_contradicts_nothing(qwen, with_rope):
    for read in (qwen, with_rope("PI", 2.0), with_rope("NTK", 4.0)):
        assert contradictions(read, to_hf_config(read)) == []

"""config.json to ModelConfig: architectures, defaults, every refusal, and the tensors expected."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llm_boost.checkpoint.checkpoint import TensorInfo
from llm_boost.errors import CheckpointError
from llm_boost.models.config import ModelConfig, check_tensors, expected_tensors

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": None}


def parse(config: dict, **changes: object) -> ModelConfig:
    return ModelConfig.from_hf({**config, **changes}, "m/config.json")


def test_llama():
    config = parse(LLAMA)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    flags = (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, config.tie_word_embeddings)
    assert not any(flags)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2, 3), None)
    assert (config.max_position_embeddings, config.max_model_len, config.torch_dtype) == (512, 512, "float32")
    assert config.rope.theta == 10000.0


PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())


@pytest.mark.parametrize(
    ("name", "head_dim", "max_model_len", "parameters"),
    [
        ("Llama-2-7b", 128, 4096, 6738415616),
        ("Llama-3.1-8B", 128, 131072, 8030261248),
        ("Qwen2-7B-Instruct", 128, 32768, 7615616512),
        ("Qwen3-0.6B", 128, 40960, 596049920),
        ("Mistral-7B-v0.1", 128, 4096, 7241732096),
    ],
)
def test_published_models(name, head_dim, max_model_len, parameters):
    """The sum over the expected tensors is the number of parameters on the model's page."""
    config = parse(PUBLISHED[name])
    assert (config.head_dim, config.max_model_len) == (head_dim, max_model_len)
    assert sum(math.prod(shape) for shape in expected_tensors(config).values()) == parameters


def test_defaults_of_old_files():
    old = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    config = parse(old, rope_scaling=None, torch_dtype="float16", eos_token_id=-1, tie_word_embeddings=True)
    assert (config.num_kv_heads, config.rms_norm_eps, config.torch_dtype) == (4, 1e-6, "float16")
    assert config.eos_token_ids == ()
    assert config.tie_word_embeddings
    assert parse(LLAMA, dtype="bfloat16").torch_dtype == "bfloat16"
    assert parse({**LLAMA, "architectures": None}, model_type="llama").architecture == "LlamaForCausalLM"


def test_biases_and_norms():
    assert parse(QWEN2).qkv_bias
    assert not parse(QWEN2).o_bias
    biased = parse(LLAMA, attention_bias=True, mlp_bias=True)
    assert biased.qkv_bias
    assert biased.o_bias
    assert biased.mlp_bias
    qwen3 = parse(QWEN3)
    assert qwen3.qk_norm
    assert qwen3.head_dim == 32
    assert not qwen3.qkv_bias
    del (without := dict(QWEN3))["head_dim"]
    assert parse(without).head_dim == 128


def test_the_tensors_settle_what_the_config_leaves_out():
    names = {"model.layers.0.self_attn.q_proj.bias": 0, "model.embed_tokens.weight": 0}
    config = ModelConfig.from_hf(LLAMA, "config.json", names)
    assert (config.qkv_bias, config.o_bias, config.tie_word_embeddings) == (True, False, True)
    config = ModelConfig.from_hf({**LLAMA, "tie_word_embeddings": False}, "config.json", names)
    assert not config.tie_word_embeddings


def test_sliding_windows_cap_the_length():
    mistral = parse(MISTRAL, sliding_window=128)
    assert (mistral.max_position_embeddings, mistral.max_model_len, mistral.sliding_window) == (128, 128, 128)
    assert parse(MISTRAL).max_model_len == 512
    qwen = {"sliding_window": 128, "max_window_layers": 1}
    assert parse(QWEN2, **qwen, use_sliding_window=False).max_model_len == 512
    assert parse(QWEN2, **qwen, use_sliding_window=True).max_model_len == 128
    assert parse(QWEN2, sliding_window=128, max_window_layers=2, use_sliding_window=True).max_model_len == 512


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"type": "linear", "factor": 2.0}, 1024),
        ({"type": "dynamic", "factor": 4.0}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 512),
    ],
)
def test_scaling_stretches_the_length(scaling, length):
    assert parse(LLAMA, rope_scaling=scaling).max_model_len == length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "is ['GPT2LMHeadModel']; supported: LlamaForCausalLM, Mistral",
        ),
        ({"architectures": [], "model_type": "bert"}, "architectures is 'bert'; supported:"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; supported:"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be an integer from 1 to 1048576"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": 10**4000}, "it must be an integer from 1"),
        ({"hidden_size": 66}, "hidden_size is 66; it must be a multiple of num_attention_heads, 4"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3; it must be a divisor of num_attention_heads, 4",
        ),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"intermediate_size": []}, "intermediate_size is []"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be \"silu\""),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'; it must be a token id"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, float16, bfloat16"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config is {'quant_method': 'awq'}; it must be absent",
        ),
        ({"layer_types": ["linear_attention"]}, "layer_types is ['linear_attention']"),
        ({"attention_bias": 1}, "attention_bias is 1"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(CheckpointError) as caught:
        parse(LLAMA, **changes)
    assert str(caught.value).startswith("m/config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "vocab_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ],
)
def test_missing_values_are_named(key):
    with pytest.raises(CheckpointError, match=f"m/config.json: {key} is missing; it must be"):
        parse({k: v for k, v in LLAMA.items() if k != key})


def test_expected_tensors():
    shapes = expected_tensors(parse(QWEN2))
    assert len(shapes) == 3 + 2 * (9 + 3)
    assert shapes["model.layers.1.self_attn.k_proj.bias"] == (32,)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (64, 96)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (100, 64)
    assert "lm_head.weight" not in expected_tensors(parse(LLAMA, tie_word_embeddings=True))
    assert expected_tensors(parse(QWEN3))["model.layers.0.self_attn.q_norm.weight"] == (32,)
    assert expected_tensors(parse(QWEN3))["model.layers.0.self_attn.q_proj.weight"] == (128, 64)


def checkpoint(shapes: dict, rows: dict | None = None) -> SimpleNamespace:
    infos = {name: TensorInfo(name, shape, "float32") for name, shape in shapes.items()}
    return SimpleNamespace(path="m", tensors=infos, read_rows=lambda name, *_: (rows or {})[name])


def test_check_tensors_accepts_and_warns_once():
    config = parse(LLAMA)
    shapes = expected_tensors(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_tensors(config, checkpoint({**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}))
    with pytest.warns(
        UserWarning, match=r"2 tensors are not part of the model.*'extra.0', 'extra.1'"
    ) as caught:
        check_tensors(config, checkpoint({**shapes, "extra.0": (1,), "extra.1": (1,)}))
    assert len(caught) == 1


def test_check_tensors_names_what_is_missing_or_wrong():
    config = parse(LLAMA)
    shapes = expected_tensors(config)
    del shapes["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"^m: tensor model.norm.weight \[64\] is missing$"):
        check_tensors(config, checkpoint(shapes))
    shapes["model.norm.weight"] = (65,)
    with pytest.raises(
        CheckpointError, match=r"model.norm.weight has shape \[65\], config.json makes it \[64\]"
    ):
        check_tensors(config, checkpoint(shapes))


def test_a_head_said_to_be_tied_must_be_a_copy():
    config = parse(LLAMA, tie_word_embeddings=True)
    shapes = {**expected_tensors(config), "lm_head.weight": (100, 64)}
    same = np.ones((64, 64), dtype=np.float32)
    check_tensors(config, checkpoint(shapes, {"model.embed_tokens.weight": same, "lm_head.weight": same}))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head.weight differs"):
        check_tensors(
            config, checkpoint(shapes, {"model.embed_tokens.weight": same, "lm_head.weight": 2 * same})
        )

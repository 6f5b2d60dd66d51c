"""Rope rows against transformers' own, for every scaling type (tests/goldens/make_checkpoint_goldens.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm_boost.errors import CheckpointError
from llm_boost.models.config import ModelConfig
from llm_boost.models.rope import RopeConfig, RopeTable, inverse_frequencies

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "rope.npz")
SETTINGS = json.loads(str(GOLDEN["settings"]))
STEPS = json.loads(str(GOLDEN["steps"]))
CASES = [(name, head_dim) for name in SETTINGS for head_dim in (64, 128)]
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 10,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def config(settings: dict, head_dim: int) -> ModelConfig:
    return ModelConfig.from_hf({**BASE, "hidden_size": 4 * head_dim, **settings}, "config.json")


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_frequencies_are_those_of_transformers(name, head_dim):
    rope = config(SETTINGS[name], head_dim).rope
    np.testing.assert_allclose(
        inverse_frequencies(rope, head_dim), GOLDEN[f"{name}.{head_dim}.inv_freq"], rtol=2e-7, atol=0
    )


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_rows_are_those_of_transformers(name, head_dim):
    table = RopeTable(config(SETTINGS[name], head_dim), 2048)
    for step, (prompt_len, positions) in enumerate(STEPS):
        lengths = np.full(len(positions), prompt_len, dtype=np.int32)
        rows = table.rows(np.array(positions, dtype=np.int32), lengths)
        # The dynamic base comes out of a power whose last bit transformers itself does not fix.
        atol = 3e-5 if name == "dynamic" else 1e-6
        for ours, part in zip(rows, ("cos", "sin"), strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, GOLDEN[f"{name}.{head_dim}.{step}.{part}"], rtol=0, atol=atol)


def test_dynamic_rows_depend_on_their_own_sequence_alone():
    table = RopeTable(config(SETTINGS["dynamic"], 64), 2048)
    positions = np.array([3, 511, 512, 699, 700, 3], dtype=np.int32)
    prompts = np.array([700, 100, 100, 700, 700, 20], dtype=np.int32)
    together = table.rows(positions, prompts)
    for i in range(len(positions)):
        alone = table.rows(positions[i : i + 1], prompts[i : i + 1])
        np.testing.assert_array_equal(together[0][i], alone[0][0])
        np.testing.assert_array_equal(together[1][i], alone[1][0])
    assert not np.array_equal(together[0][0], together[0][5])  # a long prompt stretches its first rows too


def test_the_table_grows_without_changing():
    small, large = (RopeTable(config({}, 64), 5000) for _ in range(2))
    early = np.arange(10, dtype=np.int32)
    before = small.rows(early, early)
    small.rows(np.array([4999], dtype=np.int32), np.array([1], dtype=np.int32))
    np.testing.assert_array_equal(small.rows(early, early)[0], before[0])
    np.testing.assert_array_equal(large.rows(early, early)[1], before[1])
    with pytest.raises(ValueError, match="position 5000"):
        small.rows(np.array([5000], dtype=np.int32), np.array([1], dtype=np.int32))
    assert small.rows(early[:0], early[:0])[0].shape == (0, 32)


def test_factors_of_a_gguf_are_llama3_scaling():
    """GGUF keeps Llama 3's scaling as one divisor a frequency."""
    llama3 = config(SETTINGS["llama3"], 64).rope
    plain = inverse_frequencies(RopeConfig(theta=llama3.theta), 64)
    scaled = inverse_frequencies(llama3, 64)
    factors = (plain / scaled).tolist()
    parameters = {"rope_type": "freq_factors", "rope_theta": llama3.theta, "factors": factors}
    rope = config({"rope_parameters": parameters}, 64).rope
    assert rope.rope_type == "freq_factors"
    np.testing.assert_allclose(inverse_frequencies(rope, 64), scaled, rtol=3e-7)


def test_yarn_temperature():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert config({"rope_scaling": yarn}, 64).rope.attention_factor == pytest.approx(0.1 * np.log(4) + 1)
    assert config({"rope_scaling": {**yarn, "attention_factor": 0.5}}, 64).rope.attention_factor == 0.5
    both = config({"rope_scaling": {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}}, 64).rope
    assert both.attention_factor == 1.0


@pytest.mark.parametrize("name", SETTINGS)
def test_both_spellings_of_transformers_mean_the_same(name):
    old = SETTINGS[name]
    new = {"rope_parameters": {"rope_theta": old["rope_theta"], **old.get("rope_scaling", {})}}
    assert config(old, 64).rope == config(new, 64).rope


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "config.json: rope_scaling: type is 'longrope'; it must be one of default, linear",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing; it must be a number from 1"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": {"type": 3}}, "type is 3; it must be a string"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object or null"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_parameters: rope_theta is -1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be 1"),
        ({"head_dim": 33}, "head_dim is 33; it must be even"),
        (
            {"rope_parameters": {"rope_type": "freq_factors", "factors": [1.0]}},
            "32 numbers, half of head_dim; there are 1",
        ),
        (
            {"rope_parameters": {"rope_type": "freq_factors", "factors": [0.0] * 32}},
            "a list of numbers above 0",
        ),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "high_freq_factor is 4.0; it must be above low_freq_factor",
        ),
    ],
)
def test_bad_values_are_named(settings, message):
    with pytest.raises(CheckpointError) as caught:
        config(settings, 64)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SETTINGS)
def test_prompts_of_equal_salt_have_equal_rows(name):
    """The prefix cache shares keys among them."""
    table = RopeTable(config(SETTINGS[name], 64), 2048)
    positions = np.arange(0, 900, 7, dtype=np.int32)
    salts = {}
    for length in (1, 500, 512, 513, 900):
        rows = table.rows(positions, np.full(len(positions), length, dtype=np.int32))
        for ours, same in zip(rows, salts.setdefault(table.salt(length), rows), strict=True):
            np.testing.assert_array_equal(ours, same)
    assert len(salts) == (3 if name == "dynamic" else 1)

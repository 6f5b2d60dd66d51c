"""Precedence, ranges, and what asks for more than one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from llm_boost.config.llm_boost_yaml import read_llm_boost_yaml
from llm_boost.config.run_config import RunConfig, resolve
from llm_boost.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
QWEN = CONFIGS / "predict_qwen2_7b_instruct_llm_boost.yaml"


@pytest.fixture
def qwen():
    return read_llm_boost_yaml(QWEN)


@pytest.fixture
def edited(tmp_path):
    def edited(*replacements: tuple[str, str]):
        text = QWEN.read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "edited.yaml"
        path.write_text(text)
        return read_llm_boost_yaml(path)

    return edited


def config(flags=None, yaml_config=None, environ=None) -> RunConfig:
    return resolve({"model": "m", **(flags or {})}, yaml_config, environ or {}).config


def test_file_values(qwen):
    run = config({}, qwen)
    assert (run.seq_length, run.max_decode_length, run.batch_size) == (8192, 512, 1)
    assert (run.block_size, run.num_blocks) == (32, 1024)
    assert (run.do_sample, run.temperature, run.top_k, run.top_p) == (False, 0.7, 20, 0.8)
    assert run.eos_token_ids == (151645, 151643)
    assert run.sampling()["temperature"] == 0.0
    assert run.sampling()["repetition_penalty"] == 1.05
    assert run.vocab_file is None  # the placeholder /path/vocab.json
    assert run.tokenizer_overrides["eos_token"] == "<|im_end|>"
    assert run.tokenizer_overrides.keys() == {"type", "unk_token", "eos_token", "pad_token", "chat_template"}


def test_float16_runs_as_bfloat16_and_says_so(qwen):
    resolved = resolve({"model": "m"}, qwen, {})
    assert resolved.config.dtype == "bfloat16"
    assert any("float16 runs as bfloat16" in note for note in resolved.notes)


def test_one_note_lists_what_has_no_effect(qwen):
    notes = [note for note in resolve({"model": "m"}, qwen, {}).notes if "without effect" in note]
    assert len(notes) == 1
    assert "context" in notes[0]
    assert "parallel_config.micro_batch_num" in notes[0]


def test_flag_over_environment_over_file(edited):
    file = edited(("seed: 0 ", "seed: 7 "), ("load_checkpoint: ''", "load_checkpoint: from_file"))
    environ = {
        "LLM_BOOST_SEED": "8",
        "LLM_BOOST_MODEL": "from_env",
        "LLM_BOOST_CACHE": "/env",
        "LLM_BOOST_THREADS": "",
    }
    by_file = resolve({}, file, {}).config
    by_env = resolve({}, file, environ).config
    by_flag = resolve({"seed": 9, "model": "from_flag", "cache_dir": "/flag"}, file, environ).config
    assert [run.seed for run in (by_file, by_env, by_flag)] == [7, 8, 9]
    assert [run.model for run in (by_file, by_env, by_flag)] == ["from_file", "from_env", "from_flag"]
    assert [str(run.cache_dir) for run in (by_env, by_flag)] == ["/env", "/flag"]
    assert by_env.threads is None


def test_without_a_file_nothing_is_decided():
    run = config()
    assert run.sampling() == {}
    assert (run.dtype, run.seed, run.max_decode_length) == ("auto", 0, None)


@pytest.mark.parametrize(("given", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("int4", "int4")])
def test_dtype_names(given, dtype):
    assert config({"dtype": given}).dtype == dtype


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"top_p": 1.5}, {}, "--top_p: got 1.5, allowed: less than or equal to 1"),
        ({"top_p": 0.0}, {}, "--top_p: got 0.0, allowed: greater than 0"),
        ({"temperature": -1.0}, {}, "--temperature: got -1.0, allowed: greater than or equal to 0"),
        ({"temperature": float("nan")}, {}, "--temperature: got nan, allowed: "),
        ({"min_p": 2.0}, {}, "--min_p: got 2.0, allowed: less than or equal to 1"),
        ({"repetition_penalty": 0.0}, {}, "--repetition_penalty: got 0.0, allowed: greater than 0"),
        ({"top_k": -1}, {}, "--top_k: got -1, allowed: greater than or equal to 0"),
        ({"max_new_tokens": 0}, {}, "--max_new_tokens: got 0, allowed: greater than or equal to 1"),
        ({"batch_size": 0}, {}, "--batch_size: got 0"),
        ({"threads": 0}, {}, "--threads: got 0"),
        ({"stop": ("",)}, {}, "--stop: got '', allowed: text, not empty"),
        (
            {"dtype": "int3"},
            {},
            "--dtype: got 'int3', allowed: auto, float32 (fp32), bfloat16 (bf16), int8, int4",
        ),
        ({"dtype": "float16"}, {}, "--dtype: got 'float16', allowed: "),
        ({}, {"LLM_BOOST_THREADS": "many"}, "LLM_BOOST_THREADS: got 'many', allowed: an integer"),
        ({}, {"LLM_BOOST_DTYPE": "int3"}, "LLM_BOOST_DTYPE: got 'int3', allowed: "),
        (
            {"vocab_file": "/nowhere/vocab.json"},
            {},
            "--vocab_file: got '/nowhere/vocab.json': The vocab_file should",
        ),
        ({"load_checkpoint": "other"}, {}, "--model 'm' and --load_checkpoint 'other' differ: give one"),
        ({"device_num": 2}, {}, "--device_num: got 2, allowed: 1; this version runs on one rank"),
        ({"device_id": 3}, {}, "--device_id: got 3, allowed: 0"),
        ({"only_save_strategy": True}, {}, "--only_save_strategy: got True, allowed: False"),
    ],
)
def test_wrong_values(flags, environ, message):
    with pytest.raises(ConfigError) as caught:
        config(flags, None, environ)
    assert str(caught.value).startswith(message)


def test_no_model():
    with pytest.raises(ConfigError, match="no model: give --model"):
        resolve({}, None, {})


def test_a_files_missing_vocabulary_is_named(edited):
    file = edited(('"/path/vocab.json"', '"/nowhere/vocab.json"'))
    with pytest.raises(
        ConfigError, match=r"edited.yaml: processor.tokenizer.vocab_file: got '/nowhere/vocab.json'"
    ):
        config({}, file)


def test_a_sampling_flag_turns_sampling_on_over_the_file(qwen):
    assert config({"top_k": 5}, qwen).sampling() == {
        "temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.05,
    }  # fmt: skip
    assert config({"temperature": 0.0}, qwen).do_sample is False
    assert config({"repetition_penalty": 1.2}, qwen).do_sample is False


def test_do_sample_false_beside_a_sampling_flag_is_greedy_and_says_so(qwen):
    resolved = resolve({"model": "m", "do_sample": False, "top_k": 5}, qwen, {})
    assert resolved.config.sampling()["temperature"] == 0.0
    assert "--do_sample False is greedy: --top_k without effect" in resolved.notes


def test_decode_length_is_clamped_to_the_sequence_length(qwen):
    resolved = resolve({"model": "m", "seq_length": 256}, qwen, {})
    assert resolved.config.max_decode_length == 256
    assert any("max_decode_length 512 is clamped to 256 (--seq_length)" in note for note in resolved.notes)


def test_two_flags_that_contradict_each_other():
    with pytest.raises(ConfigError, match="must be less than or equal to seq_length"):
        config({"seq_length": 256, "max_decode_length": 512})


def test_the_decode_length_flag_outranks_a_files_new_tokens(edited):
    file = edited(("    max_decode_length: 512 ", "    max_new_tokens: 5\n    max_decode_length: 512 "))
    assert config({}, file).max_new_tokens == 5
    run = config({"max_decode_length": 64}, file)
    assert (run.max_new_tokens, run.max_decode_length) == (None, 64)


def test_one_rank_runs_with_use_parallel(edited):
    file = edited(("model_parallel: 2", "model_parallel: 1"))
    assert config({"use_parallel": True, "device_num": 1}, file).model == "m"


@pytest.mark.parametrize(
    ("flags", "replacement", "message"),
    [
        (
            {"use_parallel": True},
            ("seed: 0 ", "seed: 0 "),
            "parallel_config: got 2 ranks with use_parallel True",
        ),
        (
            {},
            ("use_parallel: False", "use_parallel: True"),
            "parallel_config: got 2 ranks with use_parallel True",
        ),
        (
            {},
            ("only_save_strategy: False", "only_save_strategy: True"),
            "only_save_strategy: got True, allowed: False",
        ),
    ],
)
def test_more_than_one_rank_is_refused(edited, flags, replacement, message):
    with pytest.raises(ConfigError) as caught:
        config(flags, edited(replacement))
    assert f"edited.yaml: {message}" in str(caught.value)


def test_how_a_split_checkpoint_is_read_comes_from_the_file_and_the_flags(edited):
    file = edited(("dir: ''", "dir: 's.ckpt'"), ("auto_trans_ckpt: False", "auto_trans_ckpt: True"))
    run = config({}, file)
    assert (run.src_strategy, run.auto_trans_ckpt) == (Path("s.ckpt"), True)
    run = config({"src_strategy": "other", "auto_trans_ckpt": False}, file)
    assert (run.src_strategy, run.auto_trans_ckpt) == (Path("other"), False)
    assert config().auto_trans_ckpt is None


def test_the_flags_that_switch_ranks_off_outrank_the_file(edited):
    file = edited(("use_parallel: False", "use_parallel: True"), ("strategy: False", "strategy: True"))
    assert config({"use_parallel": False, "only_save_strategy": False}, file).model == "m"


def test_frozen():
    with pytest.raises(ValidationError):
        config().seed = 1


def test_tokenizer_file_of_the_file(edited, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.touch()
    file = edited(('vocab_file: "/path/vocab.json"', f"tokenizer_file: {path}"))
    assert config({}, file).vocab_file == path


def test_cache_memory_outranks_the_files_blocks(qwen):
    run = config({"kv_cache_memory": "1.5GB"}, qwen)
    assert (run.kv_cache_memory, run.num_blocks) == (1_500_000_000, None)
    assert config({}, qwen).kv_cache_memory is None
    with pytest.raises(ConfigError, match="--kv_cache_memory: got '2G', allowed bytes"):
        config({"kv_cache_memory": "2G"}, qwen)


def test_speculative_flags_are_a_speculative_config():
    assert config().speculation() is None
    flags = {"speculative_method": "ngram", "speculative_tokens": 4, "speculative_lookup_max": 3}
    said = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    assert config(flags).speculation() == said
    for flag, value in (("speculative_method", "eagle"), ("speculative_tokens", 33)):
        with pytest.raises(ConfigError, match=f"--{flag}: got {value!r}, allowed"):
            config({flag: value})

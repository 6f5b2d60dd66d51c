"""The llm_boost YAML: every key of the shipped files is accepted, and whatever is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llm_boost.config.llm_boost_yaml import read_llm_boost_yaml
from llm_boost.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = """
model:
  model_config:
    type: LlmBoostConfig
    boost_model_name: Qwen
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "predict.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def error_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_llm_boost_yaml(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["predict_llama2_7b_llm_boost", "predict_qwen2_7b_instruct_llm_boost"])
def test_shipped_files_are_valid(name):
    read = read_llm_boost_yaml(CONFIGS / f"{name}.yaml")
    assert {"context", "parallel", "trainer", "resume_training"} <= set(read.without_effect)
    assert not any(key.startswith("context.") for key in read.without_effect)
    assert read.model.max_decode_length == 512


def test_qwen_values():
    model = read_llm_boost_yaml(CONFIGS / "predict_qwen2_7b_instruct_llm_boost.yaml").model
    assert (model.hidden_size, model.num_layers, model.n_kv_heads) == (3584, 28, 4)
    assert model.eos_token_id == [151645, 151643]
    assert (model.block_size, model.num_blocks) == (32, 1024)
    assert model.rms_norm_eps == 1e-6


def test_idle_keys_of_a_section_with_effect_are_named_one_by_one(write):
    text = (
        MINIMAL
        + "    use_past: True\nparallel_config: {model_parallel: 1, micro_batch_num: 1}\nmoe_config: {a: 1}"
    )
    read = read_llm_boost_yaml(write(text))
    assert read.without_effect == (
        "model.model_config.use_past",
        "parallel_config.micro_batch_num",
        "moe_config",
    )


def test_numbers_that_yaml_reads_as_text(write):
    assert read_llm_boost_yaml(write(MINIMAL + "    rms_norm_eps: 1e-6")).model.rms_norm_eps == 1e-6


@pytest.mark.parametrize(("use_parallel", "ranks"), [(False, 1), (True, 2)])
def test_ranks_count_only_with_use_parallel(use_parallel, ranks):
    read = read_llm_boost_yaml(CONFIGS / "predict_qwen2_7b_instruct_llm_boost.yaml")
    assert read.ranks(use_parallel, None) == ranks


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("    seq_lenght: 8192", "model.model_config.seq_lenght: unknown key; did you mean 'seq_length'?"),
        ("    seq_length: long", "model.model_config.seq_length: got 'long', allowed: an integer"),
        ("    seq_length: 0", "model.model_config.seq_length: got 0, allowed: greater than or equal to 1"),
        ("    seq_length: 99999999999999", "model.model_config.seq_length: got 99999999999999, allowed: "),
        ("    seq_length: True", "model.model_config.seq_length: got True, allowed: an integer"),
        ("    top_p: 1.5", "model.model_config.top_p: got 1.5, allowed: less than or equal to 1"),
        ("    do_sample: 3", "model.model_config.do_sample: got 3, allowed: True or False"),
        ("    compute_dtype: int3", "model.model_config.compute_dtype: got 'int3', allowed: float16"),
        ("    llm_backend: LLMBoost", "model.model_config.llm_backend: got 'LLMBoost', allowed: BuildIn"),
        ("    extend_method: YARN", "model.model_config.extend_method: got 'YARN', allowed: None, PI or NTK"),
        ("    eos_token_id: [1, x]", "model.model_config.eos_token_id.1: got 'x', allowed: an integer"),
        ("contxt: {mode: 1}", "contxt: unknown key; did you mean 'context'?"),
        ("context: {max_device_memroy: 1GB}", "context.max_device_memroy: unknown key; did you mean 'max"),
        ("context: {device_target: TPU}", "context.device_target: got 'TPU', allowed: Ascend, GPU or CPU"),
        ("context: 3", "context: got 3, allowed: a section of keys"),
        ("run_mode: train", "run_mode: got 'train', allowed: predict"),
        ("processor: {tokenizer: {type: BertTokenizer}}", "processor.tokenizer.type: got 'BertTokenizer'"),
        ("3: 4", "3: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(write, line, message):
    path = write(MINIMAL + line)
    assert error_of(path).startswith(f"{path}: {message}")


def test_types_and_architectures(write):
    text = (CONFIGS / "predict_llama2_7b_llm_boost.yaml").read_text()
    assert "model.model_config.type: got 'LlamaConfig', allowed: LlmBoostConfig" in error_of(
        write(text.replace("type: LlmBoostConfig", "type: LlamaConfig"))
    )
    assert "model.arch.type: got 'LlamaForCausalLM', allowed: LlmBoostForCausalLM" in error_of(
        write(text.replace("type: LlmBoostForCausalLM", "type: LlamaForCausalLM"))
    )
    assert "boost_model_name: got 'Gemma', allowed: Llama or Qwen" in error_of(
        write(text.replace("boost_model_name: Llama", "boost_model_name: Gemma"))
    )


def test_missing_keys_and_several_faults(write):
    assert "model: missing; an llm_boost YAML needs it" in error_of(write("seed: 0"))
    message = error_of(write("model: {model_config: {type: LlmBoostConfig}}\nseed: x"))
    assert message.endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: 0\nseed: 1", ":2: not valid YAML: key 'seed' is given twice"),
        (MINIMAL + "    top_k: 1\n    top_k: 2", "key 'top_k' is given twice"),
        ("model: [", "not valid YAML"),
        ("seed: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("- a\n- b", "got ['a', 'b'], allowed: a mapping"),
        ("", "got None, allowed: a mapping"),
        (b"seed: \xff\xfe", "not valid YAML"),
        ("[" * 5000, "not valid YAML: nested too deeply"),
        ("seed: &a [*a]", "allowed: an integer"),
        ("#" * (1 << 20) + "\n#", "larger than 1048576 bytes"),
    ],
)
def test_files_that_are_no_configuration(write, text, reason):
    assert reason in error_of(write(text))


def test_a_missing_file(tmp_path):
    assert "cannot read the YAML file: No such file" in error_of(tmp_path / "absent.yaml")


def test_merge_keys_may_override(write):
    text = "base: &base {top_k: 1}\n" + MINIMAL + "    <<: {top_k: 3}\n    top_k: 4"
    assert "base: unknown key" in error_of(write(text))
    assert read_llm_boost_yaml(write(text.split("\n", 1)[1])).model.top_k == 4


def test_an_import_name_stays_a_name(write):
    text = MINIMAL + "    auto_map: {AutoModel: no_such_module.Model}"
    assert "model.model_config.auto_map" in read_llm_boost_yaml(write(text)).without_effect


def test_the_files_hold_all_keys_of_their_sections():
    # A key dropped from a shipped file would no longer be seen to be accepted.
    qwen = yaml.safe_load((CONFIGS / "predict_qwen2_7b_instruct_llm_boost.yaml").read_text())
    llama = yaml.safe_load((CONFIGS / "predict_llama2_7b_llm_boost.yaml").read_text())
    assert len(qwen["model"]["model_config"]) == 34
    assert len(llama["model"]["model_config"]) == 29
    assert {"runner_config", "processor"} <= qwen.keys()
    assert {"callbacks", "recompute_config"} <= llama.keys()

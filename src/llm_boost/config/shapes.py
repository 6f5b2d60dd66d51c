"""The model's shape as an llm_boost YAML gives it, beside that of a Hugging Face config.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_boost.config.llm_boost_yaml import LlmBoostYaml
from llm_boost.errors import ConfigError

_SAME_MEANING = {  # key of the YAML: key of config.json
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embedding": "max_position_embeddings",
}
_FAMILIES = {"Llama": ("Llama", "Mistral"), "Qwen": ("Qwen",)}
_ARCHITECTURES = {"Llama": "LlamaForCausalLM", "Qwen": "Qwen2ForCausalLM"}
_MODEL_TYPES = {"Llama": "llama", "Qwen": "qwen2"}


class Contradiction(NamedTuple):
    key: str
    value: object
    hf_key: str
    hf_value: object


def contradictions(yaml_config: LlmBoostYaml, hf_config: Mapping[str, Any]) -> list[Contradiction]:
    """Where both speak and differ. Numbers that a float32 cannot tell apart are equal."""
    return list(_contradictions(yaml_config, hf_config))


def check_shapes(yaml_config: LlmBoostYaml, hf_config: Mapping[str, Any], hf_path: Path) -> None:
    """Raises ConfigError that shows both values and both files of the first contradiction."""
    for key, value, hf_key, hf_value in contradictions(yaml_config, hf_config):
        raise ConfigError(
            f"{yaml_config.path}: model.model_config.{key} is {value!r}, "
            f"but {hf_path}: {hf_key} is {hf_value!r}; "
            "take the key out of the YAML file, or give the checkpoint that it describes"
        )


def to_hf_config(yaml_config: LlmBoostYaml) -> dict[str, Any]:
    """A config.json for a checkpoint without one: the YAML, and where it is silent LlmBoostConfig's defaults.

    An absent intermediate_size follows MindFormers: 8/3 of hidden_size, rounded up to a multiple of 256.
    Whether the head is tied is left to the checkpoint's tensors to say.
    """
    model = yaml_config.model
    family = model.boost_model_name
    hidden_size = model.hidden_size or 4096
    num_heads = model.num_heads or 32
    seq_length = model.seq_length or 2048
    theta, scaling = _rope(yaml_config)
    return {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": _MODEL_TYPES[family],
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "num_hidden_layers": model.num_layers or 32,
        "num_attention_heads": num_heads,
        "num_key_value_heads": model.n_kv_heads or num_heads,
        "vocab_size": model.vocab_size or 32000,
        "intermediate_size": model.intermediate_size or 256 * math.ceil(8 * hidden_size // 3 / 256),
        "rms_norm_eps": model.rms_norm_eps or 1e-5,
        "rope_theta": theta or 10000.0,
        "rope_scaling": scaling,
        "max_position_embeddings": model.max_position_embedding or seq_length,
        "bos_token_id": 1 if model.bos_token_id is None else model.bos_token_id,
        "eos_token_id": model.eos_token_id or [2],
        "pad_token_id": 0 if model.pad_token_id is None else model.pad_token_id,
    }


def _contradictions(yaml_config: LlmBoostYaml, hf_config: Mapping[str, Any]) -> Iterator[Contradiction]:
    model = yaml_config.model
    for architecture in hf_config.get("architectures") or ():
        if not str(architecture).startswith(_FAMILIES[model.boost_model_name]):
            yield Contradiction("boost_model_name", model.boost_model_name, "architectures", architecture)
    for key, hf_key in _SAME_MEANING.items():
        value, hf_value = getattr(model, key), hf_config.get(hf_key)
        if value is not None and hf_value is not None and not _equal(value, hf_value):
            yield Contradiction(key, value, hf_key, hf_value)
    vocab_size = hf_config.get("vocab_size")
    for token in model.eos_token_id or ():
        if isinstance(vocab_size, int) and token >= vocab_size:
            yield Contradiction("eos_token_id", token, "vocab_size", vocab_size)
    yield from _rope_contradictions(yaml_config, hf_config)


def _rope_contradictions(yaml_config: LlmBoostYaml, hf_config: Mapping[str, Any]) -> Iterator[Contradiction]:
    model = yaml_config.model
    theta, scaling = _rope(yaml_config)
    # transformers 5 writes rope_parameters; earlier ones rope_theta and rope_scaling
    parameters = hf_config.get("rope_parameters") or {}
    hf_scaling = parameters or hf_config.get("rope_scaling") or {}
    hf_theta = parameters.get("rope_theta", hf_config.get("rope_theta"))
    if theta is not None and hf_theta is not None and not _equal(theta, hf_theta):
        yield Contradiction("theta", model.theta, "rope_theta", hf_theta)
    if model.extend_method is None:
        return
    hf_method = hf_scaling.get("rope_type", hf_scaling.get("type", "default"))
    method = scaling["rope_type"] if scaling else "default"
    if method != hf_method:
        yield Contradiction("extend_method", model.extend_method, "rope_scaling.rope_type", hf_method)
    elif scaling and not _equal(scaling["factor"], hf_scaling.get("factor")):
        yield Contradiction(
            "scaling_factor", model.scaling_factor, "rope_scaling.factor", hf_scaling.get("factor")
        )


def _rope(yaml_config: LlmBoostYaml) -> tuple[float | None, dict[str, Any] | None]:
    """(theta, rope_scaling): PI divides positions by scaling_factor; NTK multiplies theta by it."""
    model = yaml_config.model
    factor = model.scaling_factor or 1.0
    if model.extend_method == "NTK":
        return (model.theta or 10000.0) * factor, None
    if model.extend_method == "PI" and factor != 1.0:
        return model.theta, {"rope_type": "linear", "factor": factor}
    return model.theta, None


def _equal(value: object, other: object) -> bool:
    if isinstance(value, int | float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-6)
    return value == other

"""MindIE's plugin_params, and the speculative_config that they and vLLM's users write."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_boost.engine.plugin_params import PluginParams, parse_plugin_params
from llm_boost.engine.speculative_config import SpeculativeConfig
from llm_boost.errors import ConfigError


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        ({"plugin_type": "la"}, 3),
        ({"plugin_type": "la", "level": 16, "window": 1, "guess_set_size": 1}, 15),
        ({"plugin_type": "memory_decoding"}, 16),
        ({"plugin_type": "memory_decoding", "decoding_length": 5, "dynamic_algo": True}, 5),
    ],
)
def test_speculating_plugins_are_prompt_lookup(params: dict[str, Any], tokens: int) -> None:
    read = parse_plugin_params(json.dumps(params)).speculative
    assert read == SpeculativeConfig(method="ngram", num_speculative_tokens=tokens)


def test_the_other_plugins() -> None:
    assert parse_plugin_params("") == parse_plugin_params("{}") == PluginParams()
    assert parse_plugin_params('{"plugin_type": "prefix_cache"}') == PluginParams(prefix_cache=True)
    both = parse_plugin_params('{"plugin_type": "prefix_cache, splitfuse"}')
    assert both == PluginParams(prefix_cache=True, splitfuse=True)


@pytest.mark.parametrize(
    ("text", "gamma", "message"),
    [
        ("{", None, "plugin_params: got '{', allowed a JSON object"),
        ("[" * 5000, None, "plugin_params: got .* allowed a JSON object"),
        ("[]", None, r"plugin_params: got '\[\]', allowed a JSON object"),
        ('{"level": 4}', None, "plugin_type: missing, allowed: prefix_cache"),
        ('{"plugin_type": "mtp"}', None, "plugin_type: got 'mtp', allowed: prefix_cache, splitfuse, la"),
        ('{"plugin_type": "la,memory_decoding"}', None, "got la and memory_decoding"),
        ('{"plugin_type": "la", "level": 2}', None, "level: got 2, allowed an integer from 3 to 16"),
        ('{"plugin_type": "la", "window": 17}', None, "window: got 17, allowed an integer from 1 to 16"),
        ('{"plugin_type": "la", "guess_set_size": true}', None, "guess_set_size: got True"),
        ('{"plugin_type": "memory_decoding", "decoding_length": 0}', None, "decoding_length: got 0"),
        ('{"plugin_type": "memory_decoding", "dynamic_algo": 1}', None, "got 1, allowed true or false"),
        (
            '{"plugin_type": "splitfuse", "level": 4}',
            None,
            "level: no such parameter of splitfuse, allowed: none",
        ),
        ('{"plugin_type": "la"}', 29, "speculationGamma: got 29, allowed at least 30"),
        ('{"plugin_type": "memory_decoding"}', 15, "speculationGamma: got 15, allowed at least 16"),
    ],
)
def test_what_cannot_be_is_refused(text: str, gamma: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_plugin_params(text, gamma)


def test_speculative_config_of_vllm() -> None:
    read = SpeculativeConfig.from_options
    assert read(
        {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3}
    ) == SpeculativeConfig(num_speculative_tokens=5, prompt_lookup_max=3)
    assert read({"prompt_lookup_max": 1}).prompt_lookup_min == 1
    assert read({"prompt_lookup_min": 6}).prompt_lookup_max == 6
    assert read({"model": "DIR", "num_speculative_tokens": 3}).method == "draft_model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ngram", "speculative_config: got 'ngram', allowed an object"),
        ({"tokens": 4}, "got the key 'tokens', allowed: method, model"),
        ({"method": "eagle"}, "method: got 'eagle', allowed 'ngram' or 'draft_model'"),
        ({"method": "draft_model"}, "model: got None with the method 'draft_model'"),
        ({"method": "ngram", "model": "DIR"}, "model: got 'DIR' with the method 'ngram'"),
        ({"dtype": "int8"}, "dtype: got 'int8', allowed with a model only"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens: got 0, allowed an integer from 1 to 32"),
        (
            {"prompt_lookup_min": 5, "prompt_lookup_max": 4},
            "prompt_lookup_min: got 5, allowed .* from 1 to 4",
        ),
        ({"prompt_lookup_max": "4"}, "prompt_lookup_max: got '4'"),
    ],
)
def test_a_speculative_config_at_fault_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig.from_options(options)

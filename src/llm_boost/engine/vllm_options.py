"""Keyword arguments of vLLM's LLM without a meaning here: accepted at the value that asks for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from llm_boost.errors import ConfigError

# name -> (the values that ask for nothing, what to do instead)
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "cpu_offload_gb": ((0,), "weights are in memory always"),
    "data_parallel_size": ((1,), "start one process for each replica"),
    "device": (("auto", "cpu"), "the built-in engine runs on CPUs"),
    "disable_log_stats": ((True, False), ""),
    "enable_chunked_prefill": (
        (True, None),
        "prefill is always chunked; raise max_num_batched_tokens for larger chunks",
    ),
    "enable_lora": ((False,), "merge the adapter into the checkpoint"),
    "enforce_eager": ((True, False, None), ""),  # there are no graphs to capture, so both are the same
    "gpu_memory_utilization": ((0.9, 0.92), "set kv_cache_memory, in bytes"),
    "load_format": (("auto",), "the format is found from the files"),
    "pipeline_parallel_size": ((1,), "the built-in engine runs in one process"),
    "quantization": ((None,), "set dtype to int8 or int4"),
    "revision": ((None,), "download the revision, and give its directory as model"),
    "skip_tokenizer_init": ((False,), "a tokenizer is needed for stop strings and text"),
    "swap_space": ((0, 4), "preempted sequences are computed again, not swapped"),
    "tensor_parallel_size": ((1,), "the built-in engine runs in one process; set threads"),
    "tokenizer": ((None,), "set vocab_file and merges_file"),
    "tokenizer_mode": (("auto",), "the tokenizer is found from the files"),
    "trust_remote_code": ((False,), "nothing from a checkpoint is executed"),
}


def check_vllm_options(options: Mapping[str, Any], known: list[str]) -> None:
    """ConfigError for an option that is unknown or asks for something. `known`: LLM's own argument names."""
    for name, value in options.items():
        if name not in _NEUTRAL:
            near = get_close_matches(name, [*known, *_NEUTRAL], n=1)
            raise ConfigError(
                f"{name}: no such argument of LLM" + (f"; did you mean {near[0]}?" if near else "")
            )
        neutral, instead = _NEUTRAL[name]
        if not any(value is allowed or (type(value) is not bool and value == allowed) for allowed in neutral):
            allowed = " or ".join(map(repr, neutral))
            raise ConfigError(
                f"{name}: got {value!r}, allowed {allowed}" + (f"; {instead}" if instead else "")
            )

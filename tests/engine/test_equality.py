"""One text, however it comes about: the native engine's equality matrix, greedy and with a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from golden import load_golden, model_dir
from llm_boost import LLM, SamplingParams

NEW = 24
WAYS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "in chunks": {"max_num_batched_tokens": 24, "max_num_seqs": 8},
    "prompts and decodes apart": {"template_type": "Standard", "max_prefill_batch_size": 2},
    "preempted": {"num_blocks": 24, "max_num_batched_tokens": 48, "max_num_seqs": 8},
    "without the prefix cache": {"enable_prefix_caching": False},
    "on one thread": {"threads": 1},
    "on three threads": {"threads": 3},
    "with larger blocks": {"block_size": 48},
    "guessed by lookup": {"speculative_config": {"method": "ngram", "prompt_lookup_min": 1}},
    "guessed by a model": {"speculative_config": {"model": "itself", "num_speculative_tokens": 3}},
}


def load(name: str, dtype: str, cache_dir: Path, **options: Any) -> LLM:
    speculative = options.get("speculative_config")
    if speculative and "model" in speculative:
        options["speculative_config"] = {**speculative, "model": str(model_dir(name)), "dtype": "int4"}
    options = {"threads": 2, "max_model_len": 352, "block_size": 16, "num_blocks": 128, **options}
    return LLM(model_dir(name), dtype=dtype, cache_dir=cache_dir, **options)


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("qwen2", "int8"), ("qwen3", "int4")])
def test_every_way_gives_the_same_text(name: str, dtype: str, tmp_path: Path) -> None:
    golden = {length: load_golden(name, length) for length in (1, 17, 300)}
    loop = golden[17].prompt[:5] * 9  # a text that repeats itself, for guesses to be right
    prompts = [
        {"prompt_token_ids": ids}
        for ids in (*(g.prompt for g in golden.values()), loop, loop[:33], golden[300].prompt[:150])
    ]
    params = [
        SamplingParams(temperature=temperature, seed=3, max_tokens=NEW, ignore_eos=True, logprobs=1)
        for temperature in (0.0, 0.7)
    ]
    alone = load(name, dtype, tmp_path, enable_prefix_caching=False)
    expected = [[alone.generate(prompt, p)[0].outputs[0] for prompt in prompts] for p in params]
    if dtype == "float32":
        assert [output.token_ids for output in expected[0][:3]] == [g.greedy[:NEW] for g in golden.values()]
    happened = set()
    for way, options in WAYS.items():
        llm = load(name, dtype, tmp_path, **options)
        for p, outputs in zip(params, expected, strict=True):
            for turn in ("first", "again"):  # again: from the prefix cache
                got = [output.outputs[0] for output in llm.generate(prompts, p)]
                for mine, theirs in zip(got, outputs, strict=True):
                    assert mine.token_ids == theirs.token_ids, (way, turn, p.temperature)
                    assert mine.logprobs == theirs.logprobs, (way, turn, p.temperature)
        llm.engine.blocks.check_integrity([])
        stats = llm.engine.stats()
        happened |= {
            name
            for name in ("num_preemptions", "num_hit_tokens", "num_accepted_tokens")
            if getattr(stats, name) > 0
        }
    assert len(happened) == 3, "a way was not gone"

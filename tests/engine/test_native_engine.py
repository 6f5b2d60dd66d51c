"""The engine on the native runner: pressure, chunks and shared blocks change no token of transformers'."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from llm_boost import LLM, SamplingParams
from llm_boost.engine import native_runner
from llm_boost.errors import ConfigError

TESTS = Path(__file__).parents[1]
LENGTHS = (1, 17, 300)


def load(tmp_path: Path, **options: object) -> LLM:
    model = TESTS / "golden_models" / "llama"
    options = {"dtype": "float32", "threads": 2, "max_model_len": 352, "block_size": 16, **options}
    return LLM(model, cache_dir=tmp_path, **options)


def test_preemption_and_chunks_change_no_token(tmp_path: Path) -> None:
    with np.load(TESTS / "goldens" / "llama.npz") as golden:
        prompts = [golden[f"prompt_{length}"].tolist() for length in LENGTHS]
        expected = [golden[f"greedy_{length}"].tolist() for length in LENGTHS]
    # The long prompt fills 19 of 22 blocks, and its 32 new tokens need two more.
    llm = load(tmp_path, num_blocks=22, max_num_seqs=4, max_num_batched_tokens=24)
    order = [2, 0, 1, 1]
    outputs = llm.generate(
        [{"prompt_token_ids": prompts[i]} for i in order],
        SamplingParams(temperature=0, max_tokens=len(expected[0]), ignore_eos=True),
    )
    assert llm.engine.scheduler.num_preemptions > 0
    assert [output.outputs[0].token_ids for output in outputs] == [expected[i] for i in order]


@pytest.mark.parametrize("length", [5, 40])
def test_completions_that_share_a_prompt_are_those_of_a_lone_one(tmp_path: Path, length: int) -> None:
    llm = load(tmp_path, num_blocks=64, max_num_batched_tokens=64)
    prompt = {"prompt_token_ids": list(range(3, 3 + length))}
    asked = {"temperature": 1.0, "top_k": 50, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    (many,) = llm.generate(prompt, SamplingParams(n=3, **asked))
    (one,) = llm.generate(prompt, SamplingParams(**asked))
    texts = [completion.token_ids for completion in many.outputs]
    assert texts[0] == one.outputs[0].token_ids
    assert len({tuple(text) for text in texts}) == 3
    (again,) = llm.generate(prompt, SamplingParams(n=3, **asked))
    assert [completion.token_ids for completion in again.outputs] == texts


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_cached_beginning_changes_no_token(tmp_path: Path, dtype: str, temperature: float) -> None:
    """Of prompts one after another, at once in one step, and after a conversation's first answer."""
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=20, ignore_eos=True)
    common = list(range(3, 3 + 40))
    prompts = [{"prompt_token_ids": [*common, *range(60, 60 + i)]} for i in (0, 1, 5, 9, 30)]
    options = {"num_blocks": 64, "max_num_batched_tokens": 64, "dtype": dtype}
    plain = load(tmp_path, enable_prefix_caching=False, **options)
    cached = load(tmp_path, **options)
    expected = [plain.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    together = cached.generate(prompts, params)
    assert [output.outputs[0].token_ids for output in together] == expected
    assert [output.num_cached_tokens for output in together] == [0, 32, 32, 32, 48]
    again = [cached.generate(prompt, params)[0] for prompt in prompts]
    assert [output.outputs[0].token_ids for output in again] == expected
    assert [output.num_cached_tokens for output in again] == [32, 32, 32, 48, 64]
    follow_up = {"prompt_token_ids": [*again[0].prompt_token_ids, *expected[0], 7]}
    (answer,) = cached.generate(follow_up, params)
    assert answer.num_cached_tokens == 48
    assert answer.outputs[0].token_ids == plain.generate(follow_up, params)[0].outputs[0].token_ids
    cached.engine.blocks.check_integrity([])


def test_the_cache_has_the_size_that_was_asked_for(tmp_path: Path) -> None:
    block = 16 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, heads, head_dim, bytes of a float32
    llm = load(tmp_path, kv_cache_memory=10 * block + 1)
    assert (llm.kv_cache_tokens, llm.kv_cache_bytes) == (160, 10 * block)
    automatic = load(tmp_path, max_num_seqs=3)
    assert automatic.kv_cache_tokens == 3 * 352
    with mock.patch.object(
        native_runner, "available_memory", return_value=automatic.weight_bytes + 40 * block
    ):
        assert load(tmp_path).kv_cache_tokens == 20 * 16
    with mock.patch.object(native_runner, "available_memory", return_value=0):
        assert load(tmp_path).kv_cache_tokens == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_memory": 1000}, "kv_cache_memory: got 1000 bytes, allowed at least 8192, a block of 16"),
        ({"kv_cache_memory": 10**14}, "kv_cache_memory: got 100000.0 GB, allowed at most .* GB"),
        ({"kv_cache_memory": "2GB"}, "kv_cache_memory: got '2GB', allowed 1 to"),
        ({"kv_cache_memory": 10**6, "num_blocks": 4}, "and num_blocks 4: give one of them"),
        ({"num_blocks": 10**9}, "num_blocks: got 1000000000, which take .* GB, allowed at most"),
    ],
    ids=str,
)
def test_a_cache_that_cannot_be_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **options)

"""The engine on the native runner: pressure, chunks and shared blocks change no token of transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_boost import LLM, SamplingParams

TESTS = Path(__file__).parents[1]
LENGTHS = (1, 17, 300)


def load(tmp_path: Path, **options: object) -> LLM:
    model = TESTS / "golden_models" / "llama"
    return LLM(
        model, dtype="float32", threads=2, max_model_len=352, block_size=16, cache_dir=tmp_path, **options
    )


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

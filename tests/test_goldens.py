"""The engine against what transformers computed for tiny checkpoints of every architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from golden import (
    GOLDEN_MODELS,
    NEW_TOKENS,
    PROMPT_LENGTHS,
    Golden,
    LoadRunner,
    Sequences,
    load_golden,
    mean_kl,
    model_dir,
    relative_error,
)
from llm_boost import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

pytestmark = pytest.mark.parametrize("name", GOLDEN_MODELS)


def goldens_of(name: str) -> list[Golden]:
    return [load_golden(name, length) for length in PROMPT_LENGTHS]


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_float32_alone(name: str, length: int, load_runner: LoadRunner) -> None:
    golden = load_golden(name, length)
    sequences = Sequences(load_runner(name, "float32"), [golden.prompt])
    logits = sequences.forward({0: golden.prompt})
    assert relative_error(logits[0][-len(golden.logits) :], golden.logits) < 1e-4
    assert sequences.greedy(logits)[0] == golden.greedy


def test_float32_in_one_batch(name: str, load_runner: LoadRunner) -> None:
    goldens = goldens_of(name)
    sequences = Sequences(load_runner(name, "float32"), [golden.prompt for golden in goldens])
    logits = sequences.forward({i: golden.prompt for i, golden in enumerate(goldens)})
    tokens = sequences.greedy(logits)
    for i, golden in enumerate(goldens):
        assert relative_error(logits[i][-len(golden.logits) :], golden.logits) < 1e-4
        assert tokens[i] == golden.greedy


def test_float32_prefill_in_chunks_beside_decode(name: str, load_runner: LoadRunner) -> None:
    """The long prompt arrives in uneven chunks while the short ones already decode."""
    one, short, long = goldens_of(name)
    sequences = Sequences(load_runner(name, "float32"), [one.prompt, short.prompt, long.prompt])
    logits = sequences.forward({0: one.prompt, 1: short.prompt})
    tokens = [[int(logits[i][-1].argmax())] for i in (0, 1)]
    for chunk in np.split(np.array(long.prompt), [7, 8, 72, 199]):
        logits = sequences.forward({0: tokens[0][-1:], 2: chunk.tolist(), 1: tokens[1][-1:]})
        for i in (0, 1):
            tokens[i].append(int(logits[i][-1].argmax()))
    assert tokens == [one.greedy[:6], short.greedy[:6]]
    assert relative_error(logits[2][-len(long.logits) :], long.logits) < 1e-4
    assert sequences.greedy({2: logits[2]})[2] == long.greedy


# Random weights quantise worse than trained ones. The bounds are about twice what the formats cost by their
# nature (rounded weights, activations, keys and values); a fault in a model costs several nats.
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 5e-4), ("int8", 1.2e-2), ("int4", 0.6)])
def test_quantised_logits_stay_close(name: str, dtype: str, bound: float, load_runner: LoadRunner) -> None:
    goldens = goldens_of(name)
    sequences = Sequences(load_runner(name, dtype), [golden.prompt for golden in goldens])
    logits = sequences.forward({i: golden.prompt for i, golden in enumerate(goldens)})
    got = np.concatenate([logits[i][-len(golden.logits) :] for i, golden in enumerate(goldens)])
    assert mean_kl(got, np.concatenate([golden.logits for golden in goldens])) < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_generation_does_not_depend_on_the_batch(name: str, dtype: str, tmp_path: Path) -> None:
    goldens = goldens_of(name)
    llm = LLM(model=str(model_dir(name)), dtype=dtype, max_model_len=512, threads=2, cache_dir=tmp_path)
    prompts = [{"prompt_token_ids": golden.prompt} for golden in goldens]
    together = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, GREEDY)]
    alone = [list(llm.generate([prompt], GREEDY)[0].outputs[0].token_ids) for prompt in prompts]
    assert together == alone
    if dtype == "float32":
        assert together == [golden.greedy for golden in goldens]

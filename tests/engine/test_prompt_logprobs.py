"""Log-probabilities of a prompt: those of a model run by hand, whatever chunks, caches and preemption do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine_fakes import FakeRunner, FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_boost.engine import scheduler as scheduler_module
from llm_boost.engine.engine import Engine
from llm_boost.engine.outputs import RequestOutput
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.engine.scheduler_config import SchedulerConfig


def run(engine: Engine, jobs: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    ids = [engine.add({"prompt_token_ids": prompt}, params) for prompt, params in jobs]
    outputs: dict[str, RequestOutput] = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step()}
        engine.blocks.check_integrity(engine.scheduler.running)
    return [outputs[i] for i in ids]


def by_hand(runner: FakeRunner, prompt: list[int], top: int) -> list[dict[int, tuple[float, int]] | None]:
    entries: list[dict[int, tuple[float, int]] | None] = [None]
    for end in range(1, len(prompt)):
        logits = runner.logits_after(prompt[:end]).astype(np.float64)
        logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        order = np.argsort(-logits, kind="stable").tolist()
        wanted = [prompt[end], *order[:top]]
        entries.append({token: (float(logprobs[token]), order.index(token) + 1) for token in wanted})
    return entries


def check(output: RequestOutput, expected: list[dict[int, tuple[float, int]] | None]) -> None:
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(expected)
    for entry, known in zip(output.prompt_logprobs, expected, strict=True):
        if known is None:
            assert entry is None
            continue
        assert entry is not None
        assert list(entry) == list(known)
        for token, (logprob, rank) in known.items():
            assert entry[token].logprob == pytest.approx(logprob, abs=1e-4)
            assert entry[token].rank == rank
            assert entry[token].decoded_token == FakeTokenizer().decode([token], skip_special_tokens=False)


prompts = st.lists(st.integers(2, 127), min_size=1, max_size=40)


@given(
    st.lists(st.tuples(prompts, st.sampled_from([None, 0, 1, 5]), st.integers(1, 2)), min_size=1, max_size=6),
    st.integers(1, 24),
    st.integers(1, 4),
    st.integers(17, 60),
    st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_they_are_the_models_own(
    jobs: list[tuple[list[int], int | None, int]], budget: int, seqs: int, num_blocks: int, most: int
) -> None:
    runner = FakeRunner(num_blocks=num_blocks)
    engine = Engine(
        runner,
        FakeTokenizer(),
        {1},
        SchedulerConfig(max_num_seqs=min(seqs, budget), max_num_batched_tokens=budget),
    )
    common = [9, 8, 7, 6, 5, 4, 3, 2, 9]  # two blocks that the prefix cache will hold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "MAX_SCORED_TOKENS", most)
        asked: list[Any] = [
            (
                (common + prompt)[:48],
                SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, n=n, prompt_logprobs=top),
            )
            for prompt, top, n in jobs
        ]
        outputs = run(engine, asked)
    for (prompt, params), output in zip(asked, outputs, strict=True):
        for completion in output.outputs:
            assert completion.token_ids == runner.greedy(prompt, len(completion.token_ids))
        if params.prompt_logprobs is None:
            assert output.prompt_logprobs is None
        else:
            check(output, by_hand(runner, prompt, params.prompt_logprobs))


def test_a_step_never_gives_more_logits_than_its_bound() -> None:
    runner = FakeRunner(num_blocks=400, max_model_len=1024)
    engine = Engine(runner, FakeTokenizer(), {1})
    (output,) = run(engine, [([5] * 300, SamplingParams(max_tokens=1, prompt_logprobs=0))])
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 300
    rows = [len(batch.logit_rows) for batch in runner.batches]
    assert sum(rows) == 300
    assert max(rows) == scheduler_module.MAX_SCORED_TOKENS


def test_a_prompt_with_nan_in_its_middle_fails_alone() -> None:
    runner = FakeRunner()
    runner.poisoned_tokens = {66}
    engine = Engine(runner, FakeTokenizer(), {1})
    asked = SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=1)
    bad, good = run(engine, [([65, 66, 67], asked), ([65, 67], asked)])
    assert bad.error is not None
    assert "NaN" in bad.error
    assert bad.outputs[0].finish_reason == "error"
    assert good.error is None
    check(good, by_hand(runner, [65, 67], 1))

"""Thousands of requests, ended at any moment: each ends exactly once, and every block comes back."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden import model_dir
from llm_boost import LLM, SamplingParams
from llm_boost.errors import RequestError

REQUESTS = int(os.environ.get("LLM_BOOST_TEST_REQUESTS", "600"))  # 10000 before a release


@pytest.mark.parametrize(
    "options",
    [
        {"speculative_config": {"method": "ngram", "prompt_lookup_min": 1}, "max_preempt_count": 2},
        {"template_type": "Standard", "support_select_batch": True, "prefill_time_ms_per_req": 1},
    ],
    ids=["Mix", "Standard"],
)
def test_every_block_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    llm = LLM(
        model_dir("llama"),
        dtype="int8",
        threads=1,
        cache_dir=tmp_path,
        max_model_len=128,
        block_size=16,
        num_blocks=20,
        max_num_seqs=12,
        max_num_batched_tokens=96,
        max_first_token_wait_time=5,
        **options,
    )
    engine = llm.engine
    if engine._speculator is not None:  # take all drafts, whatever this machine measures
        engine._speculator._best = lambda guesses, num_sequences: len(guesses)  # type: ignore[method-assign]
    draw = np.random.default_rng(len(options))
    ends: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    live: set[str] = set()
    refused: list[tuple[str, str]] = []
    added = 0

    def take(outputs: list[Any]) -> None:
        for output in outputs:
            assert output.request_id in live, "an output after the end"
            if output.finished:
                live.discard(output.request_id)
                ends[output.request_id] += 1
                reasons.update(completion.finish_reason for completion in output.outputs)

    while added < REQUESTS or live:
        for _ in range(int(draw.integers(0, 4)) if added < REQUESTS and len(live) < 16 else 0):
            length = int(draw.integers(1, 140))  # some can never fit
            prompt = (np.arange(length) % int(draw.integers(2, 9)) + 3).tolist()
            params = SamplingParams(
                temperature=float(draw.choice([0.0, 1.0])),
                max_tokens=int(draw.integers(1, 30)),
                n=int(draw.choice([1, 1, 1, 3])),
                repetition_penalty=float(draw.choice([1.0, 1.2])),
                ignore_eos=bool(draw.integers(2)),
            )
            asked: dict[str, Any] = {"prompt_token_ids": prompt}
            if draw.random() < 0.2:
                asked["cache_salt"] = "tenant"
            added += 1
            try:
                request_id = engine.add(
                    asked,
                    params,
                    stream=bool(draw.integers(2)),
                    priority=int(draw.integers(-1, 2)),
                    timeout=0.02 if draw.random() < 0.05 else None,
                )
            except RequestError as error:
                refused.append((str(error), f"prompt: got {length} tokens, allowed at most 127"))
            else:
                live.add(request_id)
        if live and draw.random() < 0.15:
            output = engine.abort(sorted(live)[int(draw.integers(len(live)))])
            take([output])
        take(engine.step())
        if added % 50 == 0:
            engine.blocks.check_integrity(engine.scheduler.running)
    engine.blocks.check_integrity([])
    stats = engine.stats()
    assert set(ends.values()) == {1}
    assert len(ends) == added - len(refused) >= 0.8 * REQUESTS
    assert {"stop", "length", "abort", "timeout"} >= reasons.keys() >= {"length", "abort"}
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert stats.num_free_blocks + stats.num_cached_blocks == 20
    assert refused
    assert all(message.startswith(beginning) for message, beginning in refused)
    assert ("max_preempt_count" in options) <= (stats.num_preemptions > 0)
    assert stats.num_hit_tokens > 0
    assert ("speculative_config" in options) == (stats.num_accepted_tokens > 0)

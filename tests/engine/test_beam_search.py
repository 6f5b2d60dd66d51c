"""Beam search finds what transformers' finds, and what trying everything finds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from engine_fakes import FakeRunner, FakeTokenizer, fake_llm

from llm_boost import LLM, BeamSearchParams
from llm_boost.errors import RequestError

TESTS = Path(__file__).parents[1]
CASES = json.loads((TESTS / "goldens" / "beam_search.json").read_text())


@pytest.fixture(scope="module")
def golden_llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LLM]:
    cache = tmp_path_factory.mktemp("packed")
    return {
        name: LLM(
            TESTS / "golden_models" / name,
            dtype="float32",
            threads=2,
            max_model_len=352,
            block_size=16,
            num_blocks=64,
            cache_dir=cache,
        )
        for name in {case["model"] for case in CASES}
    }


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['model']}-{c['prompt']}-{c['beam_width']}-{c['length_penalty']}"
)
def test_the_texts_are_transformers(golden_llms: dict[str, LLM], case: dict[str, Any]) -> None:
    llm = golden_llms[case["model"]]
    with np.load(TESTS / "goldens" / f"{case['model']}.npz") as golden:
        prompt = golden[case["prompt"]].tolist()
    params = BeamSearchParams(
        beam_width=case["beam_width"],
        max_tokens=case["max_tokens"],
        length_penalty=case["length_penalty"],
        include_stop_str_in_output=True,
    )
    with mock.patch.object(llm, "_eos_token_ids", return_value=set(case["eos"])):
        (output,) = llm.beam_search({"prompt_token_ids": prompt}, params)
    assert [sequence.tokens[len(prompt) :] for sequence in output.sequences] == case["texts"]
    for sequence, score in zip(output.sequences, case["scores"] or [], strict=False):
        length = len(sequence.logprobs)
        assert sequence.cum_logprob / length ** case["length_penalty"] == pytest.approx(score, rel=1e-3)
    llm.engine.blocks.check_integrity([])


def by_trying_everything(
    runner: FakeRunner, prompt: list[int], length: int
) -> list[tuple[float, tuple[int, ...]]]:
    texts = []
    for text in itertools.product(range(runner.vocab_size), repeat=length):
        total = 0.0
        for i, token in enumerate(text):
            logits = runner.logits_after([*prompt, *text[:i]]).astype(np.float64)
            total += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        texts.append((total, text))
    return sorted(texts, reverse=True)


def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all() -> None:
    runner = FakeRunner(vocab_size=6, num_blocks=200)
    expected = by_trying_everything(runner, [3, 2], 3)[:36]
    params = BeamSearchParams(beam_width=36, max_tokens=3, ignore_eos=True)
    (output,) = fake_llm(runner).beam_search({"prompt_token_ids": [3, 2]}, params)
    assert [tuple(s.tokens[2:]) for s in output.sequences] == [text for _, text in expected]
    for sequence, (total, _) in zip(output.sequences, expected, strict=True):
        assert sequence.cum_logprob == pytest.approx(total, abs=1e-4)
        assert sum(e[t].logprob for e, t in zip(sequence.logprobs, sequence.tokens[2:], strict=True)) == (
            pytest.approx(total, abs=1e-4)
        )
        assert sequence.finish_reason == "length"


def test_prompts_do_not_touch_each_other_and_text_is_of_all_tokens() -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=5)
    llm = fake_llm(FakeRunner(num_blocks=400))
    together = llm.beam_search(["hello", "x"], params)
    apart = [llm.beam_search(prompt, params)[0] for prompt in ("hello", "x")]
    assert together == apart
    for sequence in together[0].sequences:
        assert sequence.text == FakeTokenizer().decode(sequence.tokens)
        assert sequence.text.startswith("hello")


def test_an_end_is_left_out_unless_it_is_wanted() -> None:
    runner = FakeRunner()
    first = runner.greedy([0, 120], 1)[0]
    llm = fake_llm(runner)
    with mock.patch.object(llm, "_eos_token_ids", return_value={first}):
        (plain,) = llm.beam_search("x", BeamSearchParams(beam_width=1, max_tokens=5))
        (ended,) = llm.beam_search(
            "x", BeamSearchParams(beam_width=1, max_tokens=5, include_stop_str_in_output=True)
        )
        (going_on,) = llm.beam_search("x", BeamSearchParams(beam_width=1, max_tokens=5, ignore_eos=True))
    assert plain.sequences[0].tokens == [0, 120]
    assert (plain.sequences[0].finish_reason, plain.sequences[0].stop_reason) == ("stop", first)
    assert ended.sequences[0].tokens == [0, 120, first]
    assert going_on.sequences[0].tokens == [0, 120, *runner.greedy([0, 120], 5)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beam_width": 0}, "beam_width: got 0, allowed an integer from 1 to 64"),
        ({"beam_width": 65}, "beam_width: got 65"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"temperature": 0.5}, "temperature: got 0.5"),
        ({"length_penalty": float("nan")}, "length_penalty: got nan"),
        ({"ignore_eos": 1}, "ignore_eos: got 1, allowed True or False"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message.replace(".", r"\.")):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **wrong})


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_runs() -> None:
    runner = FakeRunner(max_model_len=64)
    params = BeamSearchParams(beam_width=2, max_tokens=60)
    with pytest.raises(
        RequestError, match=r"prompts\[1\]: got 6 tokens and max_tokens 60, allowed 64 together"
    ):
        fake_llm(runner).beam_search(["x", "hello"], params)
    assert runner.batches == []

"""Real checkpoints in float32: the same 64 greedy tokens as transformers, prompt by prompt.

Runs with LLM_BOOST_MODELS=FOLDER, which holds the checkpoints named below as Hugging Face directories.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llm_boost import LLM, SamplingParams

MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b")
NEW_TOKENS = 64

pytestmark = pytest.mark.models


@cache
def golden_cases(name: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((Path(__file__).parent / "goldens" / f"{name}.json").read_text())
    return cases


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[str, LLM]:
    directory = Path(os.environ["LLM_BOOST_MODELS"]) / request.param
    return request.param, LLM(model=str(directory), dtype="float32", max_model_len=1024, threads=2)


def test_the_prompts_tokenize_alike(model: tuple[str, LLM]) -> None:
    name, llm = model
    greedy = SamplingParams(temperature=0, max_tokens=1)
    cases = golden_cases(name)
    outputs = llm.generate([case["text"] for case in cases], greedy)
    assert [list(output.prompt_token_ids) for output in outputs] == [case["prompt"] for case in cases]


def test_greedy_tokens_are_those_of_transformers(model: tuple[str, LLM]) -> None:
    name, llm = model
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    cases = golden_cases(name)
    assert len(cases) >= 20
    outputs = llm.generate([{"prompt_token_ids": case["prompt"]} for case in cases], greedy)
    parted = []
    for case, output in zip(cases, outputs, strict=True):
        got, want = list(output.outputs[0].token_ids), case["tokens"]
        if got != want:
            step = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
            parted.append(
                f"{case['text'][:40]!r} at token {step}, where the best led by {case['margins'][step]}"
            )
    assert not parted, "\n".join(parted)

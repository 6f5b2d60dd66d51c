from __future__ import annotations

from engine_fakes import FakeRunner

from llm_boost.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def test_greedy_is_what_the_model_says(make_llm):
    runner = FakeRunner()
    outputs = make_llm(runner).generate(
        ["hello", "a longer prompt than a block", {"prompt_token_ids": [5]}], GREEDY
    )
    prompts = [[0, *b"hello"], [0, *b"a longer prompt than a block"], [5]]
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.finished
        assert output.prompt_token_ids == prompt
        assert output.outputs[0].token_ids == runner.greedy(prompt, 12)
        assert output.outputs[0].finish_reason == "length"

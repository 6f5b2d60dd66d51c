"""LLM in vLLM's shape, on a fake model."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from engine_fakes import FakeRunner, fake_parts

from llm_boost import LLM
from llm_boost.engine import llm as llm_module
from llm_boost.engine.llm import check_same_vocabulary
from llm_boost.engine.sampling_params import SamplingParams
from llm_boost.errors import ConfigError, EngineError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS: list[Any] = ["hello", "a longer prompt than a block", {"prompt": "x"}, {"prompt_token_ids": [5]}]
TOKENS = [[0, *b"hello"], [0, *b"a longer prompt than a block"], [0, 120], [5]]


def test_generate_gives_what_the_model_says_in_order(make_llm):
    runner = FakeRunner()
    outputs = make_llm(runner).generate(PROMPTS, GREEDY)
    for output, prompt, ids in zip(outputs, PROMPTS, TOKENS, strict=True):
        assert output.finished
        assert output.prompt_token_ids == ids
        assert output.prompt == (prompt.get("prompt") if isinstance(prompt, dict) else prompt)
        assert output.outputs[0].token_ids == runner.greedy(ids, 12)
        assert output.outputs[0].finish_reason == "length"


def test_one_prompt_needs_no_list(make_llm):
    llm = make_llm()
    for prompt in PROMPTS:
        assert [o.prompt_token_ids for o in llm.generate(prompt, GREEDY)] == [
            o.prompt_token_ids for o in llm.generate([prompt], GREEDY)
        ]
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_parameters(make_llm):
    llm = make_llm()
    each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 1, 2)]
    outputs = llm.generate(["a", "b", "c"], each)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 1, 2]
    for wrong in (each[:2], [None] * 3, "greedy", {"n": 1}):
        with pytest.raises(RequestError, match="sampling_params: got"):
            llm.generate(["a", "b", "c"], wrong)


def test_the_model_says_how_it_wants_to_be_sampled(make_llm):
    config = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "max_length": 99}
    params = make_llm(generation_config=config | {"max_new_tokens": 7}).default_sampling_params()
    assert params == SamplingParams(
        temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05, max_tokens=7
    )
    assert make_llm().default_sampling_params() == SamplingParams()
    llm = make_llm(generation_config={"temperature": 0.6, "do_sample": False})
    assert (
        llm.generate("x")[0].outputs[0].token_ids
        == llm.generate("x", SamplingParams(temperature=0))[0].outputs[0].token_ids
    )


@pytest.mark.parametrize("eos", [65, [65, 66]])
def test_generation_config_may_name_more_ends(make_llm, eos):
    llm = make_llm(generation_config={"eos_token_id": eos})
    output = llm.generate("x", SamplingParams(logit_bias={65: 100}))[0].outputs[0]
    assert (output.token_ids, output.text, output.finish_reason) == ([65], "", "stop")


def test_stream_grows_to_what_generate_gives(make_llm):
    llm = make_llm()
    whole = llm.generate(PROMPTS, GREEDY)
    texts: dict[str, str] = {}
    last = {}
    for output in llm.stream(PROMPTS, GREEDY):
        texts[output.request_id] = texts.get(output.request_id, "") + output.outputs[0].delta
        assert output.outputs[0].text == texts[output.request_id]
        last[output.request_id] = output
    assert list(texts.values()) == [output.outputs[0].text for output in whole]
    assert all(output.finished for output in last.values())


def test_streams_and_generate_do_not_take_each_others_outputs(make_llm):
    llm = make_llm()
    expected = [output.outputs[0].text for output in llm.generate(["one", "two", "three"], GREEDY)]
    first, second = llm.stream("one", GREEDY), llm.stream("two", GREEDY)
    next(first)
    assert llm.generate("three", GREEDY)[0].outputs[0].text == expected[2]
    assert [*second][-1].outputs[0].text == expected[1]
    assert [*first][-1].outputs[0].text == expected[0]


def test_a_stream_left_early_is_aborted(make_llm):
    llm = make_llm()
    closed = llm.stream("one", GREEDY)
    next(closed)
    closed.close()
    assert list(closed) == []
    assert not llm.engine.has_work
    forgotten = llm.stream(["one", "two"], GREEDY)
    next(forgotten)
    del forgotten
    gc.collect()
    assert not llm.engine.has_work
    assert len(llm.generate("three", GREEDY)) == 1


def test_a_prompt_at_fault_is_named_and_nothing_runs(make_llm):
    runner = FakeRunner()
    llm = make_llm(runner)
    with pytest.raises(RequestError, match=r"^prompts\[2\]: prompt: got an empty string"):
        llm.generate(["a", "b", ""], GREEDY)
    with pytest.raises(RequestError, match=r"^prompt: got an empty string"):
        llm.generate("", GREEDY)
    for wrong in (5, [5], None):
        with pytest.raises(RequestError, match=r"^prompt: got (int|NoneType), allowed"):
            llm.generate(wrong, GREEDY)
    assert not runner.batches
    assert not llm.engine.has_work
    assert len(llm.generate("a", GREEDY)) == 1


def test_a_model_that_fails_raises_and_the_llm_lives_on(make_llm):
    runner = FakeRunner()
    llm = make_llm(runner)
    runner.crash = True
    with pytest.raises(EngineError, match="the fake model crashed"):
        llm.generate(["a", "b"], GREEDY)
    runner.crash = False
    assert not llm.engine.has_work
    assert len(llm.generate(["a", "b"], GREEDY)) == 2


def test_an_interrupt_leaves_no_request_behind(make_llm, monkeypatch):
    runner = FakeRunner()
    llm = make_llm(runner)

    def interrupt(batch: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY)
    gc.collect()
    assert not llm.engine.has_work
    assert len(llm.generate("a", GREEDY)) == 1


def test_chat_applies_the_template(make_llm):
    llm = make_llm()
    hello = [{"role": "user", "content": "hello"}]
    (output,) = llm.chat(hello, GREEDY)
    assert output.prompt == "user:hello;assistant:"
    assert output.prompt_token_ids == list(b"user:hello;assistant:")
    outputs = llm.chat([hello, [{"role": "user", "content": "bye"}]], GREEDY, add_generation_prompt=False)
    assert [output.prompt for output in outputs] == ["user:hello;", "user:bye;"]
    for wrong in ([], "hello", None):
        with pytest.raises(RequestError, match="messages"):
            llm.chat(wrong, GREEDY)


def test_it_tells_what_it_runs_on(make_llm):
    llm = make_llm()
    assert (llm.weight_bytes, llm.threads, llm.isa, llm.max_model_len) == (1234, 2, "fake", 64)
    assert llm.model_config.architecture == "Fake"
    assert llm.tokenizer.encode("a") == [0, 97]


def test_a_progress_bar_changes_nothing(make_llm, capsys):
    llm = make_llm()
    shown = llm.generate(["a", "b"], GREEDY, use_tqdm=True)
    assert capsys.readouterr().out == ""  # stdout belongs to the program that asks
    assert [o.outputs[0].text for o in shown] == [o.outputs[0].text for o in llm.generate(["a", "b"], GREEDY)]


def test_vllm_arguments_are_accepted_where_they_ask_for_nothing(make_llm):
    neutral = {
        "tensor_parallel_size": 1,
        "trust_remote_code": False,
        "gpu_memory_utilization": 0.9,
        "swap_space": 4,
    }
    make_llm(**neutral, enforce_eager=True, quantization=None, tokenizer_mode="auto")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tensor_parallel_size", 2, "got 2, allowed 1"),
        ("tensor_parallel_size", True, "got True, allowed 1"),
        ("trust_remote_code", True, "nothing from a checkpoint is executed"),
        ("gpu_memory_utilization", 0.5, "kv_cache_memory"),
        ("quantization", "awq", "dtype"),
        ("max_num_seq", 4, "no such argument of LLM; did you mean max_num_seqs"),
        ("qqq", 4, "no such argument of LLM"),
        ("max_num_seqs", 0, "max_num_seqs: got 0"),
        ("max_num_batched_tokens", 0, "max_num_batched_tokens: got 0"),
        ("seed", None, "seed: got None"),
    ],
)
def test_arguments_that_ask_for_what_is_not_there_are_refused(monkeypatch, name, value, message):
    def load(*args: Any, **options: Any) -> Any:
        raise AssertionError("the model was loaded before the arguments were checked")

    monkeypatch.setattr(llm_module, "load_parts", load)
    with pytest.raises(ConfigError, match=message):
        LLM("model", **{name: value})


def test_scheduling_terms_reach_the_scheduler(make_llm: Any) -> None:
    llm = make_llm(template_type="Standard", max_prefill_batch_size=3, max_iter_times=5, max_num_seqs=7)
    config = llm.engine.scheduler.config
    assert (config.template_type, config.max_prefill_batch_size, config.max_num_seqs) == ("Standard", 3, 7)
    (output,) = llm.generate("hello", SamplingParams(max_tokens=9, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 5
    with pytest.raises(ConfigError, match="template_type: got 'standard'"):
        make_llm(template_type="standard")


def test_a_draft_model_has_the_models_vocabulary() -> None:
    target, smaller, other = fake_parts(), fake_parts(FakeRunner(vocab_size=100)), fake_parts()
    other.tokenizer.encode = lambda text: [ord(c) + 1 for c in text]
    check_same_vocabulary("DIR", fake_parts(FakeRunner(vocab_size=130)), target)
    with pytest.raises(ConfigError, match="DIR has 100 tokens, allowed at least the model's 128"):
        check_same_vocabulary("DIR", smaller, target)
    with pytest.raises(ConfigError, match=r"DIR cuts .* into other tokens than the model"):
        check_same_vocabulary("DIR", other, target)


def test_plugin_params_ask_for_what_mindie_means(make_llm: Any) -> None:
    speculator = make_llm(plugin_params='{"plugin_type": "la", "level": 7}').engine._speculator
    assert speculator._most == 6
    assert make_llm(plugin_params='{"plugin_type": "prefix_cache"}').engine._speculator is None
    make_llm(plugin_params='{"plugin_type": "splitfuse"}')
    with pytest.raises(ConfigError, match="template_type: got 'Standard', allowed 'Mix' with splitfuse"):
        make_llm(plugin_params='{"plugin_type": "splitfuse"}', template_type="Standard")
    with pytest.raises(ConfigError, match="speculative_config: given beside plugin_params"):
        make_llm(plugin_params='{"plugin_type": "la"}', speculative_config={"method": "ngram"})


def test_bad_words_are_not_written(make_llm):
    """Whole words, also when their first letters are free: only what completes one is forbidden."""
    llm = make_llm(FakeRunner(max_model_len=256))
    plain = llm.generate("x", GREEDY)[0].outputs[0].text
    bad = [plain[1:3], plain[0]]
    text = llm.generate("x", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, bad_words=bad))
    assert not any(word in text[0].outputs[0].text for word in bad)
    with pytest.raises(RequestError, match=r"bad_words: got 'a string of 1001 characters'"):
        SamplingParams(bad_words=["x" * 1001])


def test_allowed_token_ids_are_all_there_is(make_llm):
    llm = make_llm()
    params = SamplingParams(temperature=2, max_tokens=30, ignore_eos=True, allowed_token_ids=[65, 70, 127])
    assert set(llm.generate("x", params)[0].outputs[0].token_ids) == {65, 70, 127}
    for ids in ([], [-1], "ab"):
        with pytest.raises(RequestError, match="allowed_token_ids: got"):
            SamplingParams(allowed_token_ids=ids)
    with pytest.raises(RequestError, match=r"allowed_token_ids: got token id 128, allowed 0\.\.127"):
        llm.generate("x", SamplingParams(allowed_token_ids=[128]))


def test_the_best_of_several_come_back_best_first(make_llm):
    llm = make_llm()
    asked = {"temperature": 1.5, "seed": 4, "max_tokens": 6, "ignore_eos": True}
    (every,) = llm.generate("x", SamplingParams(n=6, logprobs=0, **asked))
    ranked = sorted(every.outputs, key=lambda c: -c.cumulative_logprob)
    (best,) = llm.generate("x", SamplingParams(n=2, best_of=6, **asked))
    assert [c.text for c in best.outputs] == [c.text for c in ranked[:2]]
    assert [c.index for c in best.outputs] == [0, 1]
    assert best.outputs[0].cumulative_logprob == pytest.approx(ranked[0].cumulative_logprob)
    assert best.outputs[0].logprobs is None
    assert len(list(llm.stream("x", SamplingParams(best_of=3, **asked)))) == 1
    for wrong in (0, 1, 129):
        with pytest.raises(RequestError, match="best_of: got"):
            SamplingParams(n=2, best_of=wrong)


@pytest.mark.parametrize(("keep", "kept"), [(3, 3), (100, 20), (-1, 20), (None, 20)])
def test_a_prompt_is_truncated_from_the_left(make_llm, keep, kept):
    prompt = {"prompt_token_ids": list(range(40, 60))}
    params = SamplingParams(temperature=0, max_tokens=2, truncate_prompt_tokens=keep)
    assert make_llm().generate(prompt, params)[0].prompt_token_ids == list(range(60 - kept, 60))


def test_truncation_makes_room_for_the_answer(make_llm):
    llm = make_llm(FakeRunner(max_model_len=64))
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, truncate_prompt_tokens=-1)
    (output,) = llm.generate({"prompt_token_ids": [5] * 200}, params)
    assert (len(output.prompt_token_ids), len(output.outputs[0].token_ids)) == (54, 10)
    for wrong in (0, -2, True, "x"):
        with pytest.raises(RequestError, match="truncate_prompt_tokens: got"):
            SamplingParams(truncate_prompt_tokens=wrong)


def test_without_detokenising_there_are_ids_alone(make_llm):
    llm = make_llm()
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    completion = llm.generate("x", params)[0].outputs[0]
    assert completion.text == ""
    assert completion.token_ids == llm.generate("x", GREEDY)[0].outputs[0].token_ids
    with pytest.raises(RequestError, match="stop: allowed with detokenize=True"):
        SamplingParams(detokenize=False, stop="a")


def test_vllms_names_for_what_an_llm_is_made_of(make_llm):
    llm = make_llm(generation_config={"temperature": 0.25})
    assert llm.get_tokenizer() is llm.tokenizer
    assert llm.get_default_sampling_params().temperature == 0.25


def test_a_final_message_goes_on(make_llm):
    llm = make_llm()
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel "}]
    (output,) = llm.chat(talk, GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt == "user:Hi;assistant:Hel"
    with pytest.raises(
        RequestError, match="continue_final_message: allowed with add_generation_prompt=False"
    ):
        llm.chat(talk, GREEDY, continue_final_message=True)
    with pytest.raises(RequestError, match="does not show the last message"):
        llm.chat(
            [{"role": "user", "content": ""}],
            GREEDY,
            add_generation_prompt=False,
            continue_final_message=True,
        )


def test_priorities_of_prompts(make_llm):
    llm = make_llm(max_num_seqs=1)
    order = [
        output.prompt
        for output in llm._outbox.open(llm._add(["a", "b", "c"], GREEDY, stream=False, priority=[3, 1, 2]))
    ]
    assert order == ["b", "c", "a"]
    assert [output.prompt for output in llm.generate(["a", "b"], GREEDY, priority=[2, 1])] == ["a", "b"]
    with pytest.raises(RequestError, match=r"priority: got 1, allowed one, or one a prompt \(2\)"):
        llm.generate(["a", "b"], GREEDY, priority=[1])

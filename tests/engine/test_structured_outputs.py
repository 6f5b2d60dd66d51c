"""Texts that obey a rule, whatever the model would rather say."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from engine_fakes import FakeRunner, FakeTokenizer, fake_llm
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_boost import AsyncLLM, SamplingParams, StructuredOutputsParams
from llm_boost.engine import grammar as grammar_module
from llm_boost.engine.engine import Engine
from llm_boost.engine.grammar import Grammar, GrammarCompiler, GrammarError
from llm_boost.engine.scheduler_config import SchedulerConfig
from llm_boost.errors import RequestError

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def params(rule: dict[str, Any], **more: Any) -> SamplingParams:
    asked = {"temperature": 0, "max_tokens": 60, **more}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**rule), **asked)


def texts(
    rule: dict[str, Any], runner: FakeRunner | None = None, **more: Any
) -> list[tuple[str, str | None]]:
    llm = fake_llm(runner or FakeRunner(max_model_len=512, num_blocks=400))
    (output,) = llm.generate("x", params(rule, **more))
    return [(c.text, c.finish_reason) for c in output.outputs]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("rule", "obeys"),
    [
        ({"json": PERSON}, lambda t: set(json.loads(t)) == {"name", "age"}),
        ({"json": json.dumps(PERSON), "disable_any_whitespace": True}, lambda t: '": ' not in t),
        ({"regex": "[a-c]{3,6}[0-9]"}, re.compile("[a-c]{3,6}[0-9]").fullmatch),
        ({"choice": ["red", "green", "gre"]}, lambda t: t in ("red", "green", "gre")),
        ({"grammar": 'root ::= "<" [a-z]? ">"'}, re.compile("<[a-z]?>").fullmatch),
        ({"grammar": 'start: "<" /[a-z]/ ">"'}, re.compile("<[a-z]>").fullmatch),
    ],
)
def test_the_text_obeys_and_ends_by_itself(rule: dict[str, Any], obeys: Any, seed: int) -> None:
    ((text, reason),) = texts(rule, temperature=1.5, seed=seed, max_tokens=400)
    assert reason == "stop"
    assert obeys(text), text


def test_json_object_is_any_object_and_length_still_ends_it() -> None:
    ((text, reason),) = texts({"json_object": True}, max_tokens=5)
    assert text.startswith("{")
    assert reason == "length"


def test_end_of_sequence_comes_where_the_rule_is_met_and_nowhere_else() -> None:
    """The model wants to end at once and always; the rule lets it after two letters, and goes on to nine."""
    rule = {"regex": "[ab]{2,9}"}
    ((text, reason),) = texts(rule, logit_bias={1: 100})
    assert (len(text), reason) == (2, "stop")
    ((text, reason),) = texts(rule, logit_bias={1: 100}, min_tokens=5)
    assert (len(text), reason) == (5, "stop")
    ((text, reason),) = texts(rule, logit_bias={1: 100}, min_tokens=50)  # the rule's end outranks min_tokens
    assert (len(text), reason) == (9, "stop")
    ((text, reason),) = texts(rule, logit_bias={1: 100}, ignore_eos=True)
    assert (len(text), reason) == (9, "stop")


def test_a_stop_token_of_the_request_is_an_end_too() -> None:
    llm = fake_llm()
    (output,) = llm.generate("x", params({"regex": "[ab]{2,9}"}, stop_token_ids=[90], logit_bias={90: 100}))
    completion = output.outputs[0]
    assert len(completion.token_ids) == 3
    assert (completion.finish_reason, completion.stop_reason) == ("stop", 90)


def test_stop_strings_and_logprobs_go_on_working() -> None:
    llm = fake_llm()
    asked = params({"regex": "a{4}b{4}"}, stop="bb", logprobs=2)
    completion = llm.generate("x", asked)[0].outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("aaaa", "stop", "bb")
    assert [next(iter(entry)) for entry in completion.logprobs] == completion.token_ids
    raw = llm.generate("x", SamplingParams(temperature=0, max_tokens=1, logprobs=2))[0].outputs[0]
    best = next(iter(raw.logprobs[0]))
    assert best in completion.logprobs[0], "logprobs are the model's own, not the rule's"


def test_each_of_n_completions_goes_its_own_way() -> None:
    made = texts({"regex": "[a-z]{6}"}, n=8, temperature=2.0, seed=3)
    assert all(reason == "stop" and re.fullmatch("[a-z]{6}", text) for text, reason in made)
    assert len({text for text, _ in made}) > 4


@given(st.integers(9, 30), st.integers(1, 6), st.integers(1, 24))
@settings(max_examples=20, deadline=None)
def test_company_and_preemption_change_nothing(num_blocks: int, seqs: int, budget: int) -> None:
    rules: list[dict[str, Any] | None] = [
        {"regex": "[a-d]{5,20}"},
        None,
        {"choice": ["yes", "no"]},
        {"json": PERSON},
    ]
    asked = [
        SamplingParams(
            temperature=1,
            seed=5,
            max_tokens=20,
            n=2,
            structured_outputs=None if rule is None else StructuredOutputsParams(**rule),
        )
        for rule in rules
    ]

    def run(engine: Engine, some: list[SamplingParams]) -> list[list[str]]:
        ids = [engine.add({"prompt_token_ids": [7] * 6}, one) for one in some]
        outputs = {}
        while engine.has_work:
            outputs |= {output.request_id: output for output in engine.step()}
        engine.blocks.check_integrity([])
        return [[c.text for c in outputs[i].outputs] for i in ids]

    def make(**options: Any) -> Engine:
        return Engine(FakeRunner(num_blocks=num_blocks), FakeTokenizer(), {1}, SchedulerConfig(**options))

    together = run(make(max_num_seqs=min(seqs, budget), max_num_batched_tokens=budget), asked)
    assert together == [run(make(), [one])[0] for one in asked]


def test_special_tokens_are_no_text() -> None:
    """`.` matches any character; the tokens that begin and end a text are none."""
    llm = fake_llm()
    completion = llm.generate("x", params({"regex": "..."}, logit_bias={0: 100, 1: 100}))[0].outputs[0]
    assert len(completion.token_ids) == 3
    assert not {0, 1} & set(completion.token_ids)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "got none, allowed exactly one of json"),
        ({"regex": "a", "json_object": True}, "got regex, json_object, allowed exactly one"),
        ({"regex": ""}, "regex: got 0 characters"),
        ({"regex": 3}, "regex: got int, allowed a string"),
        ({"json": "x" * (1 << 20 | 1)}, "json: got 1048577 characters"),
        ({"choice": []}, "choice: got 0 strings"),
        ({"choice": "ab"}, "choice: got str, allowed a list of strings"),
        ({"json_object": False}, "json_object: got False, allowed True"),
        ({"regex": "a", "disable_any_whitespace": True}, "allowed with json or json_object, got regex"),
        ({"json": {}, "disable_any_whitespace": 1}, "disable_any_whitespace: got 1, allowed True or False"),
    ],
)
def test_a_rule_of_the_wrong_kind_is_refused_when_it_is_made(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        StructuredOutputsParams(**rule)
    with pytest.raises(RequestError, match="structured_outputs: got"):
        SamplingParams(structured_outputs=rule)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"json": "{"}, "structured_outputs.json: no JSON"),
        ({"json": {"type": "blah"}}, "structured_outputs.json: Invalid type: blah"),
        ({"json": {"type": object()}}, "structured_outputs.json: no JSON"),
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "root ::= x"}, "structured_outputs.grammar: "),
        ({"grammar": "no grammar"}, "structured_outputs.grammar: "),
        ({"structural_tag": {}}, "'structures' is missing"),
        ({"json": "[" * 100_000 + "]" * 100_000}, "structured_outputs.json: "),
        ({"grammar": "start: " + "(" * 50_000}, "structured_outputs.grammar: "),
        ({"regex": "((a{1000}){1000}){10}"}, "too many expressions"),
    ],
)
def test_a_bad_rule_is_an_error_of_its_request(rule: dict[str, Any], message: str) -> None:
    llm = fake_llm()
    with pytest.raises(RequestError, match=re.escape(message)) as found:
        llm.generate("x", params(rule))
    assert "\n" not in str(found.value)
    assert not llm.engine.has_work
    assert llm.generate("x", params({"choice": ["a"]}))[0].outputs[0].text == "a"


def test_a_rule_that_explodes_is_ended_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its automaton has more than a million states: half a minute, were it not for the limit."""
    monkeypatch.setattr(grammar_module, "MAX_CPU_SECONDS", 0.3)
    asked = watch_worker(monkeypatch)
    llm = fake_llm()
    for _ in range(2):
        with pytest.raises(RequestError, match=r"takes more than 0\.3 s of computing"):
            llm.generate("x", params({"json": {"type": "integer", "multipleOf": 1234567}}))
    assert len(asked) == 1
    assert texts({"regex": "ab"}) == [("ab", "stop")]


def test_an_exploding_rule_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_CPU_SECONDS", 0.7)

    async def one(engine: AsyncLLM, asked: SamplingParams) -> str:
        async for output in engine.generate("x", asked):
            text = output.outputs[0].text
        return text

    async def main() -> None:
        async with AsyncLLM(fake_llm()) as engine:
            bombs = [
                asyncio.create_task(one(engine, params({"json": {"type": "integer", "multipleOf": n}})))
                for n in (1234567, 1234577, 1234587)
            ]
            await asyncio.sleep(0)
            plain = [one(engine, SamplingParams(max_tokens=5, ignore_eos=True)) for _ in range(20)]
            await asyncio.gather(*plain)
            assert not all(bomb.done() for bomb in bombs), "the others did not wait for the bombs"
            for bomb in bombs:
                with pytest.raises(RequestError, match=r"too much memory|takes more than"):
                    await bomb

    asyncio.run(main())


def test_a_text_that_its_rule_cannot_follow_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too much for the parser in the middle of a text: that request ends with an error, no other does."""
    accept = Grammar.accept

    def accept_no_b(self: Grammar, token: int) -> None:
        if token == ord("b"):
            raise GrammarError("it is too much")
        accept(self, token)

    monkeypatch.setattr(Grammar, "accept", accept_no_b)
    engine = fake_llm().engine
    bad = engine.add("x", params({"regex": "aab"}))
    good = engine.add("x", params({"regex": "aac"}))
    outputs = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step()}
    assert outputs[bad].error == "structured_outputs: it is too much"
    assert outputs[bad].outputs[0].finish_reason == "error"
    assert outputs[good].outputs[0].text == "aac"
    engine.blocks.check_integrity([])


def watch_worker(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    ask = grammar_module._worker.ask
    monkeypatch.setattr(grammar_module._worker, "ask", lambda line: asked.append(line) or ask(line))
    return asked


def test_compiled_rules_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watch_worker(monkeypatch)
    monkeypatch.setattr(grammar_module, "MAX_CACHED_GRAMMARS", 2)
    compiler = GrammarCompiler(FakeTokenizer(), 128, {1})
    rules = [StructuredOutputsParams(regex=text) for text in "abc"]
    for rule, so_far in zip([rules[i] for i in (0, 0, 1, 0, 2, 0, 1)], (1, 1, 2, 2, 3, 3, 4), strict=True):
        compiler.compile(rule)
        assert len(asked) == so_far
    # The same schema written differently is the same rule.
    compiler.compile(StructuredOutputsParams(json='{"type": "integer"}'))
    compiler.compile(StructuredOutputsParams(json={"type": "integer"}))
    assert len(asked) == 5


def test_additional_properties_can_be_closed() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}, "properties": {"enum": [2]}}}
    for seed in range(5):
        ((text, _),) = texts(
            {"json": schema, "disable_additional_properties": True}, temperature=2, seed=seed, max_tokens=300
        )
        assert set(json.loads(text)) <= {"a", "properties"}


def test_a_structural_tag_rules_what_follows_its_trigger() -> None:
    tag = {
        "structures": [{"begin": "<f>", "schema": {"enum": [1, 2]}, "end": "</f>"}],
        "triggers": ["<f"],
    }
    llm = fake_llm()
    forced = params({"structural_tag": tag}, logit_bias={ord("<"): 100}, max_tokens=1)
    assert llm.generate("x", forced)[0].outputs[0].text == "<"
    compiler = GrammarCompiler(FakeTokenizer(), 128, {1})
    grammar = compiler.compile(StructuredOutputsParams(structural_tag=tag))
    for token in b"say <f>2</f> more":
        grammar.accept(token)
    for token in b"<f>":
        grammar.accept(token)
    with pytest.raises(GrammarError, match=r"."):
        grammar.accept(ord("3"))

"""OpenAI's endpoints, as the `openai` package and as plain requests see them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from live_service import Live

PROMPT = "hello"
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["qwen2"]
    assert client.models.retrieve("qwen2").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion_is_the_same_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="qwen2", prompt=PROMPT, **GREEDY)
    chunks = list(client.completions.create(model="qwen2", prompt=PROMPT, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 8)


def test_token_ids_and_several_prompts(client: openai.OpenAI, live: Live) -> None:
    ids = live.service.backend.tokenizer.encode(PROMPT)
    one = client.completions.create(model="qwen2", prompt=ids, **GREEDY).choices[0].text
    answer = client.completions.create(model="qwen2", prompt=[PROMPT, "you", PROMPT], n=1, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.choices[0].text == answer.choices[2].text == one


def test_several_prompts_and_completions_in_one_stream(client: openai.OpenAI) -> None:
    how = {"model": "qwen2", "prompt": [PROMPT, "you"], "n": 2, "seed": 1, "max_tokens": 6}
    whole = client.completions.create(**how)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(stream=True, **how):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}


def test_echo_and_logprobs(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="qwen2", prompt=PROMPT, echo=True, logprobs=2, **GREEDY).choices[
        0
    ]
    assert choice.text.startswith(PROMPT)
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or ()) == len(choice.logprobs.token_logprobs or ()) == 8
    assert all(len(top) >= 1 for top in choice.logprobs.top_logprobs or ())


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


def test_a_chat_is_the_same_streamed(client: openai.OpenAI) -> None:
    how = {"model": "qwen2", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 8}
    whole = client.chat.completions.create(**how).choices[0]
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(stream=True, stream_options=options, **how)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.message.content != ""
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "length"
    assert last.choices == []
    assert last.usage.completion_tokens == 8


def test_chat_logprobs(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model="qwen2", messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
    ).choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert len(entries) == 8
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy takes the likeliest


def test_content_in_parts_and_stop_strings(client: openai.OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    how = {"model": "qwen2", **GREEDY}
    whole = client.chat.completions.create(messages=[{"role": "user", "content": "hello"}], **how).choices[0]
    assert client.chat.completions.create(messages=parts, **how).choices[0].message == whole.message
    text = whole.message.content or ""
    stopped = client.chat.completions.create(messages=parts, stop=[text[2:4]], **how).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(text[2:4])], "stop")


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"temperature": -1}, "temperature", "Parameter temperature must be in [0.0,100.0], got -1."),
        ({"top_p": 0}, "top_p", "Parameter top_p must be in (0.0,1.0], got 0."),
        ({"n": "2"}, "n", "n must be integer type."),
        ({"n": 129}, "n", "maxN"),
        ({"max_tokens": 0}, "max_tokens", "Parameter max_tokens"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "999999"),
        ({"logit_bias": {"a": 1}}, None, "logit_bias"),
        ({"stop": [""]}, "stop", "stop"),
        ({"messages": []}, "messages", "messages"),
        (
            {"messages": [{"role": "king", "content": "x"}]},
            "messages[0].role",
            "role must be system, assistant, user or tool",
        ),
        ({"top_logprobs": 21}, "top_logprobs", "[0, 20]"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs", "must be true or null"),
    ],
)
def test_what_is_wrong_is_said_in_openais_form(
    live: Live, change: dict, param: str | None, says: str
) -> None:
    answer = live.post("/v1/chat/completions", {"messages": MESSAGES, **change})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]
    if param:
        assert (error["param"] or "").startswith(param)


def test_an_unknown_model_is_not_found(live: Live) -> None:
    answer = live.post("/v1/chat/completions", {"model": "gpt-9", "messages": MESSAGES})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_too_long_a_prompt_says_both_numbers(live: Live) -> None:
    answer = live.post("/v1/completions", {"prompt": [5] * 600})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "600" in answer.text
    assert "511" in answer.text


def test_unknown_fields_and_null_are_no_faults(live: Live) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2, "user": "u", "store": True, "temperature": None, "stop": None}
    assert live.post("/v1/completions", body).status_code == 200


def test_the_request_id_comes_back(live: Live) -> None:
    assert live.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert live.get("/v1/models", headers={"x-request-id": "a b"}).headers["requestuuid"] != "a b"


def test_best_of_comes_with_the_likeliest(client: openai.OpenAI, live: Live) -> None:
    how = {"model": "qwen2", "prompt": PROMPT, "max_tokens": 6, "seed": 3, "temperature": 1.5}
    every = client.completions.create(n=4, logprobs=0, **how)
    best = max(every.choices, key=lambda choice: sum(choice.logprobs.token_logprobs))
    assert client.completions.create(best_of=4, **how).choices[0].text == best.text
    wrong = {"prompt": PROMPT, "best_of": 3, "stream": True}
    assert "best_of" in live.post("/v1/completions", wrong).json()["error"]["message"]
    assert live.post("/v1/completions", {"prompt": PROMPT, "n": 3, "best_of": 2}).status_code == 400


def test_one_request_id_on_many_requests_at_a_time(live: Live) -> None:
    def ask(number: int) -> int:
        body = {"prompt": "hello", "max_tokens": 60, "ignore_eos": True}
        return live.post("/v1/completions", body, headers={"x-request-id": "same"}).status_code

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(8))) == [200] * 8


def test_events_are_server_sent(live: Live) -> None:
    with live.http.stream(
        "POST", "/v1/completions", json={"prompt": "x", "stream": True, **GREEDY}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-1])

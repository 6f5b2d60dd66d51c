"""TGI's endpoints in MindIE's shapes and in TGI's own; vLLM's /generate beside them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from live_service import Live, Serve

PROMPT = "hello"
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]


def test_the_seeds_request_gets_its_answer(live: Live) -> None:
    headers = {"Accept": "application/json", "Content-type": "application/json"}
    body = '{"inputs": "hello there","stream": false}'
    answer = live.http.post("/generate", content=body, headers=headers)
    assert answer.status_code == 200
    assert list(answer.json()) == ["generated_text"]


def test_mindies_details(live: Live) -> None:
    parameters = {**GREEDY, "details": True, "seed": 12}
    details = live.post("/generate", {"inputs": PROMPT, "parameters": parameters}).json()["details"]
    assert details["prompt_tokens"] == 5
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("length", 8, 12)
    assert details["prefill"] == []
    assert len(details["tokens"]) == 8
    assert details["tokens"][0].keys() == {"id", "logprob", "special", "text"}
    assert details["tokens"][0]["logprob"] is None
    more = {**parameters, "decoder_input_details": True}
    details = live.post("/generate", {"inputs": PROMPT, "parameters": more}).json()["details"]
    assert len(details["prefill"]) == 5


def test_mindies_stream(live: Live) -> None:
    body = {"inputs": PROMPT, "parameters": {**GREEDY, "details": True}}
    whole = live.post("/", body).json()
    assert isinstance(whole, list)
    *before, last = events(live.post("/generate_stream", body))
    assert all(event["generated_text"] is event["details"] is None for event in before)
    ids = [token for event in [*before, last] for token in event["token"]["id"]]
    assert ids == [token["id"] for token in whole[0]["details"]["tokens"]]
    assert "".join(event["token"]["text"] for event in [*before, last]) == whole[0]["generated_text"]
    assert last["generated_text"] == whole[0]["generated_text"]
    assert last["details"].keys() == {"prompt_tokens", "finish_reason", "generated_tokens", "seed"}
    assert events(live.post("/", {**body, "stream": True}))[-1]["details"]["generated_tokens"] == 8


def test_return_full_text_and_truncate(live: Live) -> None:
    body = {"inputs": PROMPT, "parameters": {**GREEDY, "return_full_text": True}}
    assert live.post("/generate", body).json()["generated_text"].startswith("hello ")
    short = {**GREEDY, "truncate": 2, "details": True}
    assert (
        live.post("/generate", {"inputs": PROMPT, "parameters": short}).json()["details"]["prompt_tokens"]
        == 2
    )


def test_sampling_is_on_when_a_value_asks_for_it(live: Live) -> None:
    def text(**parameters: Any) -> str:
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 12, **parameters}}
        return live.post("/generate", body).json()["generated_text"]

    assert len({text(temperature=2.0, seed=seed) for seed in range(5)}) > 1
    assert text(temperature=2.0, seed=3) == text(temperature=2.0, seed=3)
    assert len({text(temperature=2.0, seed=seed, do_sample=False) for seed in range(3)}) == 1


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"temperature": 0}, "Parameter temperature must be in (0.0,3.40282e+38], got 0."),
        ({"temperature": "hot"}, "parameters.temperature must be float type."),
        ({"top_k": 0}, "Parameter top_k must be in (0,2147483647], got 0."),
        ({"top_k": 1.5}, "parameters.top_k must be integer type."),
        ({"top_p": 1}, "Parameter top_p must be in (0.0,1.0), got 1."),
        ({"typical_p": 2}, "Parameter typical_p must be in (0.0,1.0], got 2."),
        ({"repetition_penalty": 0}, "Parameter 'repetition_penalty' must be in (0.0, 3.40282e+38], got 0."),
        ({"seed": -1}, "Parameter seed must be in [0, 9223372036854775807], got -1."),
        ({"max_new_tokens": 0}, "Parameter max_new_tokens must be in (0,2147483647], got 0."),
        ({"truncate": 0}, "truncate must be in (0,2147483647], got 0."),
        ({"details": 1}, "parameters.details must be boolean type."),
        ({"stop": ["", "x"]}, "Input validation error: `stop` must be list[string] if list"),
    ],
)
def test_what_is_wrong_is_said_in_mindies_words(live: Live, parameters: dict, says: str) -> None:
    answer = live.post("/generate", {"inputs": PROMPT, "parameters": parameters})
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "Input Validation Error"
    assert says in answer.json()["error"]


def test_a_stream_has_no_prefill(live: Live) -> None:
    answer = live.post("/generate_stream", {"inputs": "x", "parameters": {"decoder_input_details": True}})
    assert answer.status_code == 422
    assert "must not be true when stream is true" in answer.text


def test_the_body_decides_between_tgi_and_vllm(live: Live) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 6, "n": 2, "seed": 1}
    whole = live.post("/generate", body).json()["text"]
    assert len(whole) == 2
    assert all(text.startswith("hello ") for text in whole)
    streamed = live.post("/generate", {**body, "stream": True}).content
    *chunks, nothing = streamed.split(b"\0")
    assert nothing == b""
    texts = [json.loads(chunk)["text"] for chunk in chunks]
    assert ["hello " + "".join(part) for part in zip(*texts, strict=True)] == whole
    neither = live.post("/generate", {"text": "x"})
    assert neither.status_code == 422
    assert "`inputs` or `prompt` must be necessary" in neither.json()["error"]


def test_tokenize_and_info(live: Live) -> None:
    tokens = live.post("/tokenize", {"inputs": "hello"}).json()
    assert "".join(token["text"] for token in tokens) == "hello"
    assert (tokens[0]["start"], tokens[-1]["stop"]) == (0, 5)
    assert live.get("/info").json()["models"][0]["model_id"] == "qwen2"


# ---- text-generation-inference's own shapes, with its own client


@pytest.fixture
def tgi(serve: Serve) -> Live:
    return serve(tgi_shapes="strict")


def test_huggingfaces_client(tgi: Live) -> None:
    client = InferenceClient(tgi.url)
    how = {"do_sample": False, "max_new_tokens": 6, "details": True}
    whole = client.text_generation(PROMPT, **how)
    assert whole.details.generated_tokens == 6
    assert all(isinstance(token.logprob, float) for token in whole.details.tokens)
    parts = list(client.text_generation(PROMPT, stream=True, **how))
    assert [part.index for part in parts] == [1, 2, 3, 4, 5, 6]
    assert "".join(part.token.text for part in parts) == whole.generated_text == parts[-1].generated_text
    assert [part.token.id for part in parts] == [token.id for token in whole.details.tokens]
    assert parts[-1].details.finish_reason == "length"
    plain = client.text_generation(PROMPT, do_sample=False, max_new_tokens=6)
    assert plain == whole.generated_text
    answer = client.chat_completion([{"role": "user", "content": "hello"}], max_tokens=4)
    assert answer.usage.completion_tokens <= 4


def test_strict_errors_and_top_tokens(tgi: Live) -> None:
    wrong = tgi.post("/generate", {"inputs": "x", "parameters": {"temperature": 0}})
    assert wrong.status_code == 422
    assert wrong.json()["error_type"] == "validation"
    assert wrong.json()["error"].startswith("Input validation error: ")
    parameters = {**GREEDY, "details": True, "top_n_tokens": 2}
    details = tgi.post("/generate", {"inputs": PROMPT, "parameters": parameters}).json()["details"]
    assert [len(tops) for tops in details["top_tokens"]] == [2] * 8
    assert details["top_tokens"][0][0]["id"] == details["tokens"][0]["id"]

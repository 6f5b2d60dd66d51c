"""Triton's API, with tritonclient and by hand; MindIE's native endpoints beside it."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from live_service import Live, Serve

MODEL = "/v2/models/qwen2"
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture
def tokens(live: Live) -> list[int]:
    return live.service.backend.tokenizer.encode("hello")


def test_tritonclient(live: Live, tokens: list[int]) -> None:
    with triton.InferenceServerClient(live.url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("qwen2")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "MindIE Server"
        assert client.get_model_metadata("qwen2")["inputs"][0]["datatype"] == "UINT32"
        given = triton.InferInput("input0", [1, len(tokens)], "UINT32")
        given.set_data_from_numpy(np.array([tokens], np.uint32), binary_data=False)
        wanted = triton.InferRequestedOutput("output0", binary_data=False)
        result = client.infer("qwen2", [given], outputs=[wanted], parameters=GREEDY)
        made = result.as_numpy("output0")[0].tolist()
    text = live.service.backend.tokenizer.decode(made)
    assert len(made) == 8
    assert text == live.post("/generate", {"inputs": "hello", "parameters": GREEDY}).json()["generated_text"]


def test_generate_and_its_stream(serve: Serve) -> None:
    steps = threading.Semaphore(100)
    live = serve(before_step=steps.acquire)
    body = {"id": "a1", "text_input": "hello", "parameters": {**GREEDY, "details": True}}
    whole = live.post(f"{MODEL}/generate", body).json()
    assert (whole["id"], whole["model_name"], whole["model_version"]) == ("a1", "qwen2", None)
    assert whole["details"]["generated_tokens"] == 8
    while steps.acquire(blocking=False):
        pass
    steps.release()
    with live.http.stream("POST", f"{MODEL}/generate_stream", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        raw = [next(lines)]
        steps.release(100)  # a reader that is late would be given several tokens at once
        raw += lines
    assert raw[0].startswith("data:{")
    parts = [json.loads(line.removeprefix("data:")) for line in raw]
    assert "".join(part["text_output"] for part in parts) == whole["text_output"]
    assert parts[0]["prefill_time"] > 0
    assert parts[0]["decode_time"] is None
    assert parts[-1]["prefill_time"] is None
    assert parts[-1]["details"]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": []}, "Inputs count must be 1."),
        ({"inputs": [{"datatype": "INT64"}]}, "Unsupported datatype, got INT64."),
        ({"inputs": [{"shape": [1, 9]}]}, "Data size should be 9, got 5."),
        ({"inputs": [{"shape": [1, 1, 5]}]}, "Shape must be at most two-dimensional"),
        ({"inputs": [{"data": [1, 2, 3, 4, 2**63]}]}, "prompt_token_ids[4]"),
        ({"inputs": [{"data": [1, 2, 3, 4, -1]}]}, "prompt_token_ids[4]"),
        ({"outputs": [{"name": "a"}, {"name": "b"}]}, "Outputs size should be 1, got 2."),
        ({"parameters": {"priority": 6}}, "Parameter priority must be in [1,5], got 6."),
        ({"parameters": {"timeout": 0}}, "Parameter timeout must be strictly positive"),
        ({"id": "a b"}, "Request id"),
    ],
)
def test_what_is_wrong_with_an_infer_request(
    live: Live, tokens: list[int], change: dict[str, Any], says: str
) -> None:
    whole = {"name": "input0", "shape": [1, 5], "datatype": "UINT32", "data": tokens}
    body: dict[str, Any] = {"inputs": [whole]}
    body |= change
    body["inputs"] = [{**whole, **given} for given in body["inputs"]]
    answer = live.post(f"{MODEL}/infer", body)
    assert answer.status_code == 422, answer.text
    assert says in answer.json()["error"]


def test_a_model_that_is_not_there(live: Live) -> None:
    for path in ("/generate", "/generate_stream"):
        answer = live.post(f"/v2/models/x{path}", {"text_input": "a"})
        assert (answer.status_code, answer.json()["error"]) == (404, "Model x not found.")
    assert live.get("/v2/models/x").status_code == 404


def test_parameters_of_an_input_count_too(live: Live, tokens: list[int]) -> None:
    entry = {"name": "input0", "shape": [5], "datatype": "UINT32", "data": tokens, "parameters": GREEDY}
    answer = live.post(f"{MODEL}/infer", {"id": "42", "inputs": [entry], "outputs": [{"name": "output0"}]})
    assert answer.json()["outputs"][0]["shape"] == [1, 8]
    assert answer.json()["id"] == "42"


def test_stop_infer(serve: Serve) -> None:
    live = serve(before_step=lambda: time.sleep(0.02))
    body = {"id": "stop-me", "text_input": "hello", "parameters": {"max_new_tokens": 500, "do_sample": False}}
    with live.http.stream("POST", f"{MODEL}/generate_stream", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        stopped = live.post(f"{MODEL}/stopInfer", {"id": "stop-me"})
        rest = [line for line in lines if line]
    assert (stopped.status_code, stopped.json()) == (200, {"id": "stop-me"})
    assert len(rest) < 480
    again = live.post(f"{MODEL}/stopInfer", {"id": "stop-me"})
    assert (again.status_code, again.json()["error"]) == (404, "RequestId is stop-me not found.")


def test_native_infer(live: Live, tokens: list[int]) -> None:
    parameters = {**GREEDY, "details": True}
    text = live.post("/infer", {"inputs": "hello", "parameters": parameters}).json()
    ids = live.post("/infer_token", {"input_id": tokens, "parameters": parameters}).json()
    assert text["generated_text"] == ids["generated_text"]
    assert text["details"]["generated_token_ids"] == ids["details"]["generated_token_ids"]
    raw = live.post("/infer", {"inputs": "hello", "stream": True, "parameters": parameters}).text
    parts = [json.loads(line.removeprefix("data: ")) for line in raw.splitlines() if line]
    assert parts[-1]["generated_text"] == text["generated_text"]
    assert parts[-1]["token"]["text"] is None
    assert [i for part in parts for i in part["token"]["id"]] == text["details"]["generated_token_ids"]
    assert live.post("/infer", {"inputs": "a", "input_id": [1]}).json()["error"] == "Input conflict."
    assert live.post("/infer", {}).json()["error"] == "Not found inputs."


def test_the_tokenizer(live: Live, tokens: list[int]) -> None:
    answer = live.post("/v1/tokenizer", {"inputs": "hello", "do_decode": True}).json()
    assert answer["token_number"] == len(tokens)
    assert "".join(answer["tokens"]) == "hello"
    assert live.post("/v1/tokenizer", {"inputs": "hello", "do_decode": False}).json() == {"token_number": 5}

"""Bad requests and bad clients: each gets its answer, and the service is as it was."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from live_service import Live, Serve

from llm_boost.service import http_protocol

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
ENDLESS = {"prompt": "hello", "ignore_eos": True, "max_tokens": 490, "temperature": 0}


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def well_afterwards(live: Live):
    yield
    assert live.post("/v1/completions", {"prompt": "hello", "max_tokens": 1}).status_code == 200
    until(live.idle)


# ---- 1 to 3: bodies


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1, 2]", b"null", b"17", b'"text"', b"\xff\xfe", b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"[" * 10_000, b'{"a":' * 10_000,
        b'{"prompt": "x", "logit_bias": ' + b"[" * 80 + b"]" * 80 + b"}",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "path", ["/v1/completions", CHAT, "/generate", "/", "/infer", "/v2/models/qwen2/infer"]
)
def test_a_body_that_is_no_request(live: Live, path: str, body: bytes) -> None:
    answer = live.http.post(path, content=body)
    assert answer.status_code in (400, 422)
    assert "Traceback" not in answer.text
    assert answer.json()["error"]


def test_a_body_beyond_the_limit(serve: Serve) -> None:
    live = serve(changes={"limits": limits(max_body_bytes=1 << 20)})
    announced = live.http.post("/generate", content=b"x" * (2 << 20))
    chunked = live.http.post("/generate", content=iter([b"x" * (1 << 19)] * 5))
    for answer in (announced, chunked):
        assert (answer.status_code, answer.json()) == (
            413,
            {"message": "Request body too large. Maximum allowed size is 1MB."},
        )


def limits(**changes: Any) -> Any:
    from llm_boost.config.service_config import Limits

    return Limits(**changes)


def raw(live: Live, data: bytes, *, wait: float = 5) -> bytes:
    """What comes back for bytes sent as they are."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        received = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        with contextlib.suppress(ConnectionResetError):  # it answered, and did not read the rest
            while chunk := connection.recv(65536):
                received += chunk
        return received


@pytest.mark.parametrize("size", [70_000, 1_000_000])
def test_headers_beyond_the_limit(live: Live, size: int) -> None:
    assert size > http_protocol.MAX_HEADER_BYTES
    head = b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * size
    answer = raw(live, head + b"\r\n\r\n")
    assert b" 431 " in answer or (not answer and size == 1_000_000)


def test_slow_headers_and_a_slow_body(serve: Serve) -> None:
    live = serve(changes={"limits": limits(read_timeout=0.2)})
    assert b" 408 " in raw(live, b"POST /generate HTTP/1.1\r\nhost: a\r\n").splitlines()[0]
    head = b"POST /generate HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{"
    answer = raw(live, head)
    assert b" 408 " in answer.splitlines()[0]
    assert b"did not arrive within" in answer


def test_no_http_at_all(live: Live) -> None:
    assert b" 400 " in raw(live, b"\x16\x03\x01\x02\x00\r\n\r\n").splitlines()[0]


def test_characters_of_all_kinds(live: Live) -> None:
    for text in ("a\x00b", "\U0001f600 \u4f60\u597d", "\u202e", "\r\n\r\n", "\ufffd"):
        answer = live.post("/v1/completions", {"prompt": text, "max_tokens": 12, "stream": True})
        assert answer.status_code == 200
        answer.content.decode("utf-8")  # never half a character


# ---- 4 to 15: values


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ""}),
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": [[]]}),
        ("/v1/completions", {"prompt": [-1]}),
        ("/v1/completions", {"prompt": [10**6]}),
        ("/v1/completions", {"prompt": [2**63]}),
        ("/v1/completions", {"prompt": [1.5]}),
        ("/v1/completions", {"prompt": [True]}),
        ("/v1/completions", {"prompt": {"a": 1}}),
        ("/v1/completions", {}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": [{}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]}),
        ("/generate", {"inputs": ""}),
    ],
)
def test_a_prompt_that_is_none(live: Live, path: str, body: dict) -> None:
    assert live.post(path, body).status_code in (400, 422)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1), ("temperature", 1e30), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.5),
        ("top_k", -5), ("min_p", 2), ("min_p", -1), ("presence_penalty", 1e9), ("frequency_penalty", -3),
        ("repetition_penalty", 0), ("repetition_penalty", 1e9), ("n", 0), ("n", -1), ("n", 10**9),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 10**30), ("min_tokens", -1), ("logprobs", -1),
        ("logprobs", 10**9), ("seed", -1), ("seed", 2**70), ("stop", [""]), ("stop", "x" * (1 << 20)),
        ("stop", ["x"] * 100_000), ("stop_token_ids", [-1]), ("stop_token_ids", [10**9]),
        ("logit_bias", {"0": 1e9}), ("logit_bias", {"-1": 1}), ("logit_bias", {"999999999": 1}),
        ("logit_bias", {str(i): 1 for i in range(100_000)}), ("priority", "high"), ("timeout", 0),
        ("stream", "yes"), ("model", "x" * 300), ("stream_options", 3),
    ],
)  # fmt: skip
def test_a_parameter_out_of_range(live: Live, name: str, value: object) -> None:
    answer = live.post("/v1/completions", {"prompt": "hello", "max_tokens": 2, name: value})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert name in error["message"] or error["param"] == name
    assert len(error["message"]) < 500


def test_a_tiny_temperature_is_greedy(live: Live) -> None:
    def text(temperature: float) -> str:
        body = {"prompt": "hello", "max_tokens": 8, "temperature": temperature}
        return live.post("/v1/completions", body).json()["choices"][0]["text"]

    assert text(1e-300) == text(0)


def test_a_prompt_that_can_never_fit_the_cache(serve: Serve) -> None:
    live = serve(num_blocks=2)
    answer = live.post("/v1/completions", {"prompt": [5] * 100, "max_tokens": 2})
    assert answer.status_code == 400
    assert "KV cache holds" in answer.json()["error"]["message"]


def test_a_template_from_a_client_is_not_run(live: Live) -> None:
    for extra in (
        {"chat_template": "{{ 9**(9**9) }}"},
        {"chat_template_kwargs": {"chat_template": "{{ cycler.__init__.__globals__ }}"}},
    ):
        answer = live.post(CHAT, {"messages": MESSAGES, "max_tokens": 2, **extra})
        assert answer.status_code == 400
        assert "chat_template" in answer.json()["error"]["message"]


# ---- 16 and 17: clients that leave, and clients that do not read


def leave(
    live: Live, path: str, body: dict[str, Any], *, after_bytes: bool = False, when: Any = lambda: True
) -> None:
    """Sends a request and breaks the connection: at once, in the middle of the answer, or when it is time."""
    host, port = live.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (path.encode(), len(content))
        connection.sendall(head + content)
        if after_bytes:
            connection.recv(100)
        until(when)


@pytest.mark.parametrize("after_bytes", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_a_stream(live: Live, after_bytes: bool, n: int) -> None:
    steps = live.service.backend.stats().num_steps
    leave(live, "/v1/completions", {**ENDLESS, "stream": True, "n": n, "seed": 1}, after_bytes=after_bytes)
    until(live.idle)
    assert live.service.backend.stats().num_steps - steps < 400


def test_a_client_that_leaves_a_request_without_a_stream(serve: Serve) -> None:
    live = serve(before_step=lambda: time.sleep(0.01))
    leave(live, "/v1/completions", ENDLESS, when=lambda: live.service.admission.running == 1)
    until(live.idle)
    assert live.service.backend.stats().num_steps < 300


def test_many_clients_that_leave(live: Live) -> None:
    def crowd() -> None:
        for _ in range(15):
            leave(live, "/v1/completions", {**ENDLESS, "stream": True}, after_bytes=False)

    threads = [threading.Thread(target=crowd) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(live.idle, 20)


def test_a_client_that_does_not_read(serve: Serve) -> None:
    """Its connection is dropped after write_timeout, and its request with it; the others do not notice."""
    live = serve(changes={"limits": limits(write_timeout=0.3, token_timeout=30)})
    host, port = live.url.removeprefix("http://").split(":")
    body = {"prompt": ["hello"] * 8, "ignore_eos": True, "max_tokens": 480, "logprobs": 20, "stream": True}
    content = json.dumps(body).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(content) + content
        )
        until(lambda: live.service.admission.running > 0)
        assert live.post("/v1/completions", {"prompt": "hello", "max_tokens": 4}).status_code == 200
        until(live.idle, 20)


# ---- 18: more than there is room for


def test_a_burst_beyond_capacity(serve: Serve) -> None:
    live = serve(before_step=lambda: time.sleep(0.02), max_running=2, max_queued=3)
    codes: list[int] = []
    waits: list[str] = []

    def ask() -> None:
        answer = httpx.post(f"{live.url}/v1/completions", json={**ENDLESS, "max_tokens": 20}, timeout=30)
        codes.append(answer.status_code)
        if answer.status_code == 429:
            waits.append(answer.headers["retry-after"])
            assert answer.json()["error"]["type"] == "rate_limit_error"

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    until(lambda: live.service.admission.busy)
    assert live.get("/v2/health/ready").status_code == 503
    assert live.get("/v2/health/live").status_code == 200
    for thread in threads:
        thread.join()
    assert 5 <= codes.count(200) < 20
    assert codes.count(200) + codes.count(429) == 20
    assert all(1 <= int(wait) <= 60 for wait in waits)
    until(live.idle)


# ---- 20 and 25: an engine that fails, hangs or is too slow


def test_time_limits(serve: Serve) -> None:
    live = serve(before_step=lambda: time.sleep(0.05), e2e_timeout=0.3)
    answer = live.post("/generate", {"prompt": "hello", "max_tokens": 100, "ignore_eos": True})
    assert answer.status_code == 500
    assert answer.json()["error"] == "Engine callback timeout: server e2eTimeout"
    answer = live.post("/v2/models/qwen2/generate", {"text_input": "a", "parameters": {"timeout": 1}})
    assert "server e2eTimeout" in answer.text or answer.status_code == 200
    events = live.post("/v1/completions", {**ENDLESS, "stream": True}).text.split("\n\n")
    assert "Engine callback timeout: server e2eTimeout" in events[-3]
    until(live.idle)


def test_a_token_that_takes_too_long(serve: Serve) -> None:
    live = serve(before_step=lambda: time.sleep(0.6), token_timeout=0.3)
    answer = live.post("/generate", {"inputs": "hello"})
    assert answer.json()["error"] == "Engine callback timeout: server tokenTimeout"
    until(live.idle)


def test_a_model_that_fails_in_one_step(serve: Serve) -> None:
    faults = [RuntimeError("bad luck")]

    def step() -> None:
        if faults:
            raise faults.pop()

    live = serve(before_step=step)
    first = live.post("/v1/completions", ENDLESS)
    assert first.status_code == 500
    assert "bad luck" in first.json()["error"]["message"]
    assert live.post("/v1/completions", {"prompt": "hello", "max_tokens": 2}).status_code == 200


def test_a_stuck_engine_ends_the_service(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    import llm_boost.service.watchdog as watchdog

    ended: list[int] = []
    monkeypatch.setattr(watchdog, "LAST_SECONDS", 0.5)
    monkeypatch.setattr(watchdog, "end_process", ended.append)
    stuck = threading.Event()
    live = serve(before_step=lambda: stuck.wait(20) and None, watchdog_timeout=0.4)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(live.post("/v1/completions", ENDLESS)))
    thread.start()
    until(lambda: live.get("/health").status_code == 500)
    assert live.get("/v2/health/live").json()["message"] == "Service is abnormal"
    assert live.get("/v2/health/ready").status_code == 500
    assert live.post("/generate", {"inputs": "a"}).status_code == 500
    until(lambda: ended == [1])
    stuck.set()
    thread.join(20)
    assert live.stop() == 1


# ---- keys and strangers


def test_keys(serve: Serve) -> None:
    live = serve(api_key=("first", "second"))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first"}, {"x-api-key": ""}):
        for path in ("/v1/models", "/metrics", "/info", "/stopService", "/v1/config", "/openapi.json"):
            answer = live.get(path, headers=headers)
            assert answer.status_code == 401, path
            assert "www-authenticate" in answer.headers
        assert live.post("/generate", {"inputs": "a"}, headers=headers).status_code == 401
    for path in ("/health", "/v2/health/live", "/v2/health/ready"):
        assert live.get(path).status_code == 200
    assert live.get("/v1/models", headers={"authorization": "Bearer second"}).status_code == 200
    assert live.get("/v1/models", headers={"x-api-key": "first"}).status_code == 200


def test_pages_of_other_sites_are_refused(live: Live, serve: Serve) -> None:
    page = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    assert live.get("/stopService", headers=page).status_code == 403
    answer = live.post("/generate", {"inputs": "a"}, headers=page)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    friend = serve(allowed_origin=("https://good.example",))
    page = {"origin": "https://good.example", "sec-fetch-site": "cross-site"}
    answer = friend.get("/v1/models", headers=page)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_logs_hold_no_prompts_and_no_forged_lines(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    live = serve()
    live.post("/generate", {"inputs": "SECRET-PROMPT"}, headers={"x-request-id": "a\tb"})
    live.post("/generate", {"inputs": "SECRET-PROMPT", "parameters": {"seed": -1}})
    live.get("/nothing%0a%7B%22level%22")
    time.sleep(0.1)
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert lines
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert "SECRET" not in "".join(lines)

"""What can be seen from outside: health while a model loads, prompts in logs when asked for, traces."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import httpx
import pytest
from live_service import Serve, golden_loader

from llm_boost.errors import ConfigError
from llm_boost.service.tracing import Tracing, tracing_to


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_health_is_there_before_the_model(serve: Serve, packed: Path) -> None:
    port = free_port()
    answers: list[httpx.Response] = []

    def load(progress):
        progress(1, 4)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            answers.extend(http.get(path) for path in ("/health", "/v2/health/ready", "/v1/models"))
            answers.append(http.post("/generate", json={"inputs": "a"}))
        return golden_loader("qwen2", packed)(progress)

    live = serve(load=load, port=port)
    health, ready, models, refused = answers
    assert health.status_code == ready.status_code == refused.status_code == 503
    assert health.json()["progress"] == 0.25
    assert models.status_code == 200
    assert refused.headers["retry-after"] == "5"
    assert "being loaded (25 %" in refused.json()["error"]
    assert live.get("/health").status_code == 200


def test_prompts_are_logged_when_asked_for(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    live = serve(log_prompts=True)
    live.post("/generate", {"inputs": "a prompt\n{forged"}, headers={"x-request-id": "r1"})
    time.sleep(0.1)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line]
    (entry,) = [line for line in lines if line["event"] == "generation"]
    assert entry["prompt"] == "a prompt\n{forged"
    (request,) = [line for line in lines if line.get("request_id") == "r1"]
    assert request["ask_id"] == entry["request_id"]
    assert entry["texts"]


def test_traces(serve: Serve) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    live = serve()
    live.service.tracing = Tracing(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    live.post("/generate", {"inputs": "hello"}, headers={"traceparent": parent, "x-request-id": "r2"})
    end = time.monotonic() + 5
    while len(exporter.get_finished_spans()) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    request, generation = spans["POST /generate"], spans["generate"]
    assert f"{request.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert generation.parent.span_id == request.context.span_id
    assert request.attributes["gen_ai.request.id"] == "r2"
    assert generation.attributes["gen_ai.usage.prompt_tokens"] == 5
    assert "hello" not in str(generation.attributes)


def test_without_the_extra_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"llm-boost\[otel\]"):
        tracing_to("http://127.0.0.1:4318")

"""The management plane, metrics, and the three planes of a config.json."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import httpx
import pytest
from live_service import Live, Serve, golden_loader

from golden import model_dir
from llm_boost.config.service_config import service_config


def test_health_of_a_service_that_is_well(live: Live) -> None:
    for path in ("/health", "/v2/health/live", "/v2/health/ready", "/v2/models/qwen2/ready"):
        answer = live.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert live.get("/health/timed").json() == {"status": "healthy"}
    assert live.get("/health/timed-30").json() == {"status": "healthy"}
    assert "[1, 600]" in live.get("/health/timed-601").json()["error"]
    assert "too long" in live.get("/health/timed-1000").json()["error"]


def test_what_it_says_of_itself(live: Live) -> None:
    slots = live.get("/v2/models/qwen2/getSlotCount").json()
    assert slots["total_slots"] == slots["free_slots"] == 16
    assert live.get("/v1/config").json()["maxSeqLen"] == 512
    assert live.get("/v1/status").json()["resource"]["runningRequestNum"] == 0
    assert live.get("/v2/status").json()["resource"]["dpInstMap"] == {}
    assert live.get("/v1/engine-server/running-status").json()["status"] == 0
    live.post("/generate", {"inputs": "hello"})
    figures = {r["metric"][0]["__name__"]: r["value"] for r in live.get("/metrics-json").json()["result"]}
    assert figures["TTFT"] > 0
    assert figures["remainBlocks"] == 256


MINDIES = [
    "request_received_total", "request_success_total", "request_failed_total", "num_preemptions_total",
    "num_requests_running", "num_requests_waiting", "num_requests_swapped",
    "avg_prompt_throughput_toks_per_s", "avg_generation_throughput_toks_per_s", "failed_request_perc",
    "npu_cache_usage_perc", "cpu_cache_usage_perc", "npu_prefix_cache_hit_rate", "prompt_tokens_total",
    "generation_tokens_total", "time_to_first_token_seconds_bucket", "time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket", "request_prompt_tokens_bucket", "request_generation_tokens_bucket",
    "vllm:num_requests_running", "vllm:time_to_first_token_seconds_bucket", "vllm:generation_tokens_total",
]  # fmt: skip


def test_metrics(live: Live) -> None:
    def values() -> dict[str, float]:
        lines = live.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    before = values()
    for name in MINDIES:
        assert any(key.split("{")[0] == name and 'model_name="qwen2"' in key for key in before), name
    live.post("/generate", {"inputs": "hello", "parameters": {"max_new_tokens": 7, "do_sample": False}})
    after = values()
    label = '{model_name="qwen2"}'
    assert after[f"generation_tokens_total{label}"] - before[f"generation_tokens_total{label}"] == 7
    assert after[f"prompt_tokens_total{label}"] - before[f"prompt_tokens_total{label}"] == 5
    count = f"time_to_first_token_seconds_count{label}"
    assert after[count] - before[count] == 1


def test_unknown_paths_and_methods(live: Live) -> None:
    assert live.get("/nothing").status_code == 404
    assert live.get("/generate").status_code == 405


def mindie_file(folder: Path, **server: object) -> Path:
    path = folder / "config.json"
    deploy = {
        "maxSeqLen": 512,
        "maxInputTokenLen": 40,
        "truncation": False,
        "ModelConfig": [{"modelName": "qwen2", "modelWeightPath": str(model_dir("qwen2"))}],
    }
    schedule = {"cacheBlockSize": 16, "maxIterTimes": 30, "maxBatchSize": 16, "maxPrefillBatchSize": 8}
    body = {
        "ServerConfig": {"httpsEnabled": False, **server},
        "LogConfig": {"logPath": "logs/service.log"},
        "BackendConfig": {"ModelDeployConfig": deploy, "ScheduleConfig": schedule},
    }
    path.write_text(json.dumps(body))
    return path


def on_free_ports(path: Path) -> dict[str, object]:
    return {"config": str(path), "port": 0, "management_port": 0, "metrics_port": 0}


@pytest.fixture
def mindie(tmp_path: Path, packed: Path):
    config = service_config(on_free_ports(mindie_file(tmp_path)), {})
    live = Live(config, golden_loader("qwen2", packed))
    yield live
    live.stop()


def test_three_planes_of_a_config_json(mindie: Live, tmp_path: Path) -> None:
    assert mindie.running is not None
    addresses = mindie.running.addresses
    assert len(set(addresses.values())) == 3
    assert httpx.get(addresses["management"] + "/v1/config").json()["maxOutputLen"] == 30
    assert httpx.get(addresses["metrics"] + "/metrics").status_code == 200
    assert mindie.get("/metrics").status_code == mindie.get("/v1/config").status_code == 404
    assert httpx.post(addresses["management"] + "/generate", json={"inputs": "a"}).status_code == 404
    lines = (tmp_path / "logs/service.log").read_text().splitlines()
    assert any(json.loads(line)["event"] == "ready" for line in lines)


def test_its_limits_hold(mindie: Live) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 100, "details": True, "do_sample": False}}
    assert mindie.post("/generate", body).json()["details"]["generated_tokens"] == 30
    long = mindie.post("/generate", {"inputs": "a" * 50})
    assert long.status_code == 424
    assert "cannot be greater than 40,the input ids length is 50" in long.json()["error"].replace(", ", ",")
    wrong = mindie.post("/v1/chat/completions", {"messages": [], "model": "qwen2"})
    assert (wrong.status_code, wrong.json()["error_type"]) == (422, "Input Validation Error")


def test_stop_service_waits_for_what_runs(serve: Serve) -> None:
    live = serve(before_step=lambda: time.sleep(0.004))
    body = {"prompt": "hello", "max_tokens": 150, "ignore_eos": True, "temperature": 0}
    whole = live.post("/generate", body).json()["text"][0].removeprefix("hello ")
    body["stream"] = True
    with live.http.stream("POST", "/generate", json=body) as answer:
        chunks = answer.iter_raw()
        first = next(chunks)
        with httpx.Client(base_url=live.url, timeout=30) as other:
            done: list[int] = []
            stopper = threading.Thread(target=lambda: done.append(other.get("/stopService").status_code))
            stopper.start()
            while live.get("/v2/health/ready").status_code == 200:
                pass
            refused = live.post("/generate", {"inputs": "a"})
            assert (refused.status_code, refused.json()["error"]) == (503, "The service has been stopped.")
            assert "retry-after" in refused.headers
            assert live.get("/stopService").status_code == 500
            rest = b"".join(chunks)
            stopper.join(20)
    texts = [json.loads(chunk)["text"][0] for chunk in (first + rest).split(b"\0") if chunk]
    assert "".join(texts) == whole
    assert done == [200]
    assert live.stop() == 0

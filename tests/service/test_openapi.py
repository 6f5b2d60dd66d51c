"""The OpenAPI document is true: what it declares is what the service takes and gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from live_service import Live

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def document(live: Live) -> dict[str, Any]:
    return live.get("/openapi.json").json()


def test_every_operation_is_there_and_answers(live: Live, document: dict[str, Any]) -> None:
    bodies: dict[str, Any] = {
        "/v1/completions": {"prompt": "a", "max_tokens": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        "/v1/tokenizer": {"inputs": "a"},
        "/v2/models/{model}/generate": {"text_input": "a"},
        "/v2/models/{model}/generate_stream": {"text_input": "a"},
        "/v2/models/{model}/stopInfer": {"id": "none"},
        "/v2/models/{model}/infer": {
            "inputs": [{"name": "i", "shape": [1], "datatype": "UINT32", "data": [5]}]
        },
    }
    names = {"{model}": "qwen2", "{seconds}": "5"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path == "/stopService":
                continue
            url = path
            for name, value in names.items():
                url = url.replace(name, value)
            given = bodies.get(path, {"inputs": "a"}) if method == "post" else None
            answer = live.http.request(method, url, json=given)
            declared = operation["responses"].get(str(answer.status_code))
            assert declared is not None, (path, answer.status_code, answer.text)
            if answer.content and "content" in declared:
                media = answer.headers["content-type"].partition(";")[0]
                assert media in declared["content"], (path, media)


def test_its_references_lead_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.partition('"')[0] in schemas


def test_the_dashboard_asks_for_metrics_that_there_are(live: Live) -> None:
    dashboard = (ROOT / "docs" / "grafana-dashboard.json").read_text("utf-8")
    there = {line.split("{")[0].split(" ")[0] for line in live.get("/metrics").text.splitlines()}
    asked = set()
    for panel in json.loads(dashboard)["panels"]:
        for target in panel["targets"]:
            words = target["expr"].replace("(", " ").replace("{", " {").split()
            asked |= {word for word in words if "_" in word and word[0].isalpha() and "$" not in word}
    asked -= {"histogram_quantile"}
    assert len(asked) >= 12
    assert asked <= there, asked - there

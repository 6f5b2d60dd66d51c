"""OpenAI's API: the models, and the endpoints of its family."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from llm_boost.service.endpoint import Call, Endpoint
from llm_boost.service.events import STREAMS
from llm_boost.service.faults import Fault
from llm_boost.service.openai_chat import chat_completions
from llm_boost.service.openai_completions import completions
from llm_boost.service.openai_models import ChatRequest, CompletionRequest
from llm_boost.service.service import Service


async def list_models(call: Call) -> Response:
    service = call.service
    return JSONResponse({"object": "list", "data": [_model(service, n) for n in service.config.served_names]})


async def show_model(call: Call) -> Response:
    name = call.path("model")
    if name not in call.service.config.served_names:
        raise Fault("not_found", f"Model not found: got {name[:80]!r}", param="model")
    return JSONResponse(_model(call.service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "MindIE Server" if service.config.mindie else "llm-boost",
        "root": service.config.name,
        "parent": None,
    }


ENDPOINTS = (
    Endpoint("GET", "/v1/models", list_models, "openai", "The models served"),
    Endpoint("GET", "/v1/models/{model}", show_model, "openai", "One of them"),
    Endpoint("POST", "/v1/completions", completions, "openai", "Complete a prompt", body=CompletionRequest,
             answers=STREAMS),
    Endpoint("POST", "/v1/chat/completions", chat_completions, "openai", "Answer a conversation",
             body=ChatRequest, answers=STREAMS),
)  # fmt: skip

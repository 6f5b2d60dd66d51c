"""The OpenAPI document, made of the same declarations that serve the requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.responses import JSONResponse, Response

from llm_boost.config.service_config import ServiceConfig
from llm_boost.service.endpoint import Call, Endpoint, Family
from llm_boost.service.faults import Fault, Kind, Shape

_REF = "#/components/schemas/{model}"
_TAGS = {
    "openai": "OpenAI's API",
    "tgi": "text-generation-inference's API, in MindIE's shapes unless --tgi-shapes strict",
    "triton": "Triton's (KServe v2) API",
    "native": "MindIE's own API",
    "management": "Health, control, metrics",
}


def document(
    endpoints: Iterable[Endpoint], shapes: Mapping[Family, Shape], config: ServiceConfig
) -> dict[str, Any]:
    """OpenAPI 3.1 of these endpoints; `shapes`: how each family tells of errors."""
    from llm_boost import __version__

    chosen = list(endpoints)
    models = dict.fromkeys(model for endpoint in chosen for model in endpoint.bodies)
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    paths: dict[str, Any] = {}
    for endpoint in chosen:
        operation = _operation(endpoint, shapes[endpoint.family], secured=bool(config.api_keys))
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "LLM Boost", "version": __version__},
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, shape: Shape, *, secured: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "tags": [endpoint.family],
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method} {endpoint.path}").strip("_").lower(),
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", endpoint.path)
        ],
        "responses": _responses(endpoint, shape),
    }
    if endpoint.bodies:
        refs = [{"$ref": _REF.format(model=model.__name__)} for model in endpoint.bodies]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if secured and not endpoint.open:
        operation["security"] = [{"key": []}]
    return operation


def _responses(endpoint: Endpoint, shape: Shape) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {} for kind in endpoint.answers}
    responses: dict[str, Any] = {"200": {"description": "Well", **({"content": content} if content else {})}}
    kinds: list[Kind] = ["unauthorized", "forbidden", "failed", "unavailable"]
    if endpoint.bodies:
        kinds += ["invalid", "too_long", "not_found", "too_large", "slow", "overloaded"]
    elif "{" in endpoint.path:
        kinds.append("not_found")
    for kind in kinds:
        status, body = shape(Fault(kind, "why"))
        schema = {"type": "object", "required": sorted(body)}
        responses[str(status)] = {
            "description": kind.replace("_", " ").capitalize(),
            "content": {"application/json": {"schema": schema}},
        }
    if endpoint.open:  # health has words of its own, or none
        for ill in ("500", "503"):
            responses[ill] = {"description": "Not well, or not ready"}
    return responses


async def show(call: Call) -> Response:
    return JSONResponse(call.request.app.state.openapi)


ENDPOINTS = (
    Endpoint("GET", "/openapi.json", show, "management", "This document", also=("management", "metrics")),
)

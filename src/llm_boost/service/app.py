"""The endpoints of each plane as one ASGI application a server."""

from __future__ import annotations

from collections.abc import Collection

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llm_boost.config.service_config import ServiceConfig
from llm_boost.service import management, native, openai_api, openapi, tgi, triton
from llm_boost.service.endpoint import Endpoint, EndpointApp, Family, PlaneName, fault_response
from llm_boost.service.faults import Fault, Kind, Shape, mindie_shape, openai_shape, tgi_shape
from llm_boost.service.service import Service

ENDPOINTS: tuple[Endpoint, ...] = (
    *openai_api.ENDPOINTS,
    *tgi.ENDPOINTS,
    *triton.ENDPOINTS,
    *native.ENDPOINTS,
    *management.ENDPOINTS,
    *openapi.ENDPOINTS,
)


def build_app(service: Service, planes: Collection[PlaneName]) -> Starlette:
    """The application of a server that stands for these planes."""
    config = service.config
    chosen = [endpoint for endpoint in ENDPOINTS if set(planes) & {endpoint.plane, *endpoint.also}]
    routes = [
        Route(e.path, EndpointApp(e, service, shape_of(e.family, config)), methods=[e.method]) for e in chosen
    ]
    middleware = []
    if config.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            )
        )
    app = Starlette(routes=routes, middleware=middleware)
    shapes = {e.family: shape_of(e.family, config) for e in chosen}
    app.state.openapi = openapi.document(chosen, shapes, config)
    app.add_exception_handler(HTTPException, _no_such_endpoint)
    return app


def shape_of(family: Family, config: ServiceConfig) -> Shape:
    """How a family tells of errors."""
    if family == "openai" and not config.mindie_errors:
        return openai_shape
    if family == "tgi" and config.tgi_shapes == "strict":
        return tgi_shape
    return mindie_shape


async def _no_such_endpoint(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind: Kind = "not_found" if error.status_code == 404 else "invalid"
    response = fault_response(
        Fault(kind, f"{error.detail}: {request.method} {request.url.path[:200]}"), mindie_shape
    )
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response

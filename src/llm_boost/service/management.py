"""The management plane: health, control, and what the service is doing."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from llm_boost.service.endpoint import Call, Endpoint
from llm_boost.service.service import Phase, Service

_BUSY = "Service is alive but busy"


async def live(call: Call) -> Response:
    service = call.service
    if service.phase is Phase.READY:
        return JSONResponse({"message": _BUSY}) if service.admission.busy else Response()
    return _not_ready(service)


async def ready(call: Call) -> Response:
    service = call.service
    if service.phase is not Phase.READY:
        return _not_ready(service)
    if service.admission.busy:
        return JSONResponse({"message": f"{_BUSY}. Consider reducing request frequency"}, 503)
    return Response()


async def health(call: Call) -> Response:
    service = call.service
    return Response() if service.phase is Phase.READY else _not_ready(service)


def _not_ready(service: Service) -> Response:
    if service.phase is Phase.FAILED:
        return JSONResponse({"message": "Service is abnormal", "error": service.failure}, 500)
    if service.phase is Phase.LOADING:
        progress = {"message": "Service is loading the model", "progress": round(service.load_progress, 3)}
        return JSONResponse({**progress, "error": "unhealthy", "error_type": "healthcheck"}, 503)
    return JSONResponse({"error": "The service has been stopped.", "error_type": "Service Unavailable"}, 503)


async def metrics(call: Call) -> Response:
    return Response(call.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


ENDPOINTS = (
    Endpoint("GET", "/v2/health/live", live, "management", "management", "Whether it lives", open=True,
             also=("business",)),
    Endpoint("GET", "/v2/health/ready", ready, "management", "management", "Whether it takes requests",
             open=True, also=("business",)),
    Endpoint("GET", "/health", health, "management", "management", "Whether it is well", open=True,
             also=("business",)),
    Endpoint("GET", "/metrics", metrics, "metrics", "management", "Prometheus metrics"),
)  # fmt: skip

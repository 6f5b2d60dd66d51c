"""The management plane: health, control, and what the service is doing."""

from __future__ import annotations

from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, Response

from llm_boost.service.endpoint import Call, Endpoint, Handler
from llm_boost.service.faults import Fault
from llm_boost.service.service import Phase, Service
from llm_boost.service.triton import check_model

_BUSY = "Service is alive but busy"
_LONGEST_WAIT = 600  # seconds of /health/timed
_DEFAULT_WAIT = "10"
_FORCED_SECONDS = 5.0  # of /stopService?mode=Force


# ---- health


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


async def model_ready(call: Call) -> Response:
    check_model(call)
    return await ready(call)


async def health(call: Call) -> Response:
    service = call.service
    return Response() if service.phase is Phase.READY else _not_ready(service)


async def timed_health(call: Call) -> Response:
    """A real token is made; healthy when it comes in time."""
    text = call.request.path_params.get("seconds", _DEFAULT_WAIT)
    if not text.isascii() or not text.isdecimal() or len(text) > 3:
        raise Fault("not_found", f"Max wait time is {_LONGEST_WAIT}, input is invalid or too long")
    if not 1 <= int(text) <= _LONGEST_WAIT:
        raise Fault("not_found", f"Wait time should be in range of [1, {_LONGEST_WAIT}], input is not valid")
    if await call.service.makes_a_token(int(text)):
        return JSONResponse({"status": "healthy"})
    raise Fault("failed", f"No token was made within {text} s")


def _not_ready(service: Service) -> Response:
    if service.phase is Phase.FAILED:
        return JSONResponse({"message": "Service is abnormal", "error": service.failure}, 500)
    if service.phase is Phase.LOADING:
        progress = {"message": "Service is loading the model", "progress": round(service.load_progress, 3)}
        return JSONResponse({**progress, "error": "unhealthy", "error_type": "healthcheck"}, 503)
    return JSONResponse({"error": "The service has been stopped.", "error_type": "Service Unavailable"}, 503)


# ---- control


async def stop_service(call: Call) -> Response:
    """Answers once all requests have ended, and then ends the process."""
    service = call.service
    if service.phase is Phase.DRAINING:
        raise Fault("failed", "The service is being stopped already.")
    forced = call.request.query_params.get("mode") == "Force"
    await service.drain(_FORCED_SECONDS if forced else service.config.limits.drain_timeout)
    return Response(background=BackgroundTask(service.stop_requested.set))


# ---- what it is doing


async def slot_count(call: Call) -> Response:
    check_model(call)
    model, stats = call.service.backend.model, call.service.backend.stats()
    free_blocks = stats.num_blocks - stats.num_used_blocks
    return JSONResponse(
        {
            "total_slots": model.max_num_seqs,
            "free_slots": max(model.max_num_seqs - stats.num_running, 0),
            "available_tokens_length": free_blocks * model.block_size,
        }
    )


async def show_config(call: Call) -> Response:
    config, model = call.service.config, call.service.backend.model
    entry = config.mindie.model if config.mindie else None
    return JSONResponse(
        {
            "modelName": config.name,
            "maxSeqLen": model.max_model_len,
            "npuMemSize": entry.npuMemSize if entry else -1,
            "cpuMemSize": entry.cpuMemSize if entry else 0,
            "worldSize": entry.worldSize if entry else 1,
            "maxOutputLen": config.max_output_tokens or model.max_model_len - 1,
            "cacheBlockSize": model.block_size,
        }
    )


def _resource(service: Service) -> dict[str, Any]:
    model, stats = service.backend.model, service.backend.stats()
    free_blocks = stats.num_blocks - stats.num_used_blocks
    return {
        "availSlotsNum": max(model.max_num_seqs - stats.num_running, 0),
        "availBlockNum": free_blocks,
        "waitingRequestNum": stats.num_waiting + service.admission.queued,
        "runningRequestNum": stats.num_running,
        "swappedRequestNum": 0,
        "freeNpuBlockNums": free_blocks,
        "freeCpuBlockNums": 0,
        "totalNpuBlockNums": stats.num_blocks,
        "totalCpuBlockNums": 0,
    }


def _status(service: Service, more: dict[str, Any]) -> Response:
    if service.phase is not Phase.READY:
        raise service.unavailable()
    return JSONResponse(
        {
            "service": {"roleStatus": "RoleReady", "currentRole": "none"},
            "resource": {**_resource(service), **more},
            "linkStatus": {"peers": []},
        }
    )


async def status(call: Call) -> Response:
    return _status(call.service, {})


async def status_v2(call: Call) -> Response:
    resource = _resource(call.service)
    free = resource["availBlockNum"]
    return _status(
        call.service,
        {
            "totalAvailNpuSlotsNum": resource["availSlotsNum"],
            "totalAvailNpuBlockNum": free,
            "maxAvailNpuBlockNum": free,
            "dpInstMap": {},
        },
    )


async def running_status(call: Call) -> Response:
    """0 ready, 1 normal, 2 abnormal, 3 paused, 4 starting, 5 busy."""
    service = call.service
    numbers = {Phase.LOADING: 4, Phase.FAILED: 2, Phase.DRAINING: 3}
    number = numbers.get(
        service.phase, 5 if service.admission.busy else 1 if service.admission.running else 0
    )
    errors = [] if service.failure is None else [{"errCode": "engine", "message": service.failure}]
    return JSONResponse({"status": number, "errors": errors})


async def metrics(call: Call) -> Response:
    return Response(call.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def metrics_json(call: Call) -> Response:
    service = call.service
    stats = service.backend.stats()
    figures = {
        "TTFT": 1000 * service.metrics.mean_first_token,
        "TBT": 1000 * service.metrics.mean_per_token,
        "waitingInferRequestNum": stats.num_waiting + service.admission.queued,
        "processingInferRequestNum": stats.num_running,
        "remainBlocks": stats.num_blocks - stats.num_used_blocks,
    }
    server = call.request.scope["server"]
    instance = f"{server[0]}:{server[1]}"
    result = [
        {"metric": [{"__name__": name, "job": "node", "instance": instance}], "value": round(value, 3)}
        for name, value in figures.items()
    ]
    return JSONResponse({"resultType": "vector", "result": result})


def _get(path: str, handler: Handler, summary: str, **options: Any) -> Endpoint:
    return Endpoint("GET", path, handler, "management", summary, **{"plane": "management", **options})


_BOTH: Any = {"open": True, "also": ("business",), "answers": ()}
ENDPOINTS = (
    _get("/v2/health/live", live, "Whether it lives", **_BOTH),
    _get("/v2/health/ready", ready, "Whether it takes requests", **_BOTH),
    _get("/v2/models/{model}/ready", model_ready, "Whether the model takes requests", **_BOTH),
    _get("/health", health, "Whether it is well", **_BOTH),
    _get("/health/timed", timed_health, "Whether a token is made in 10 s"),
    _get("/health/timed-{seconds}", timed_health, "Whether a token is made in so many seconds"),
    _get("/stopService", stop_service, "Drain, then end", answers=()),
    _get("/v2/models/{model}/getSlotCount", slot_count, "Free places"),
    _get("/v1/config", show_config, "The model's limits"),
    _get("/v1/status", status, "What runs and waits"),
    _get("/v2/status", status_v2, "What runs and waits"),
    _get("/v1/engine-server/running-status", running_status, "The service's phase as a number"),
    _get("/metrics-json", metrics_json, "Averages of the last requests"),
    _get("/metrics", metrics, "Prometheus metrics", plane="metrics", answers=("text/plain",)),
)

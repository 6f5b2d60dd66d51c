"""One endpoint: who may call it, what it takes, and the way from an HTTP request to its answer."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from llm_boost.service.body import as_model, read_json
from llm_boost.service.faults import Fault, Shape
from llm_boost.service.logs import log
from llm_boost.service.service import Service

PlaneName = Literal["business", "management", "metrics"]
Family = Literal["openai", "tgi", "triton", "native", "management"]
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass
class Call:
    """One request to an endpoint."""

    service: Service
    shape: Shape
    request: Request
    request_id: str
    ask_id: str  # of its generation: unique, where a client may send one request_id many times
    body: Any = None  # the endpoint's model of it
    notes: dict[str, Any] = field(default_factory=dict)  # what its line in the log says besides

    def path(self, name: str) -> str:
        return str(self.request.path_params[name])


Handler = Callable[[Call], Awaitable[Response]]
Parser = Callable[[Any], BaseModel]


@dataclass(frozen=True)
class Endpoint:
    """A route as its API family declares it; the OpenAPI document is made of the same."""

    method: Literal["GET", "POST"]
    path: str
    handler: Handler
    family: Family
    summary: str
    plane: PlaneName = "business"
    body: type[BaseModel] | None = None
    or_body: type[BaseModel] | None = None  # another model of it
    parse: Parser | None = None  # which of the two it is, as the body itself decides
    answers: tuple[str, ...] = ("application/json",)  # media types of the answer
    open: bool = False  # needs no key
    also: tuple[PlaneName, ...] = ()  # further planes that serve it

    @property
    def bodies(self) -> list[type[BaseModel]]:
        return [model for model in (self.body, self.or_body) if model is not None]


class EndpointApp:
    """An endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint, service: Service, shape: Shape) -> None:
        self._endpoint, self._service, self._shape = endpoint, service, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        ask_id = uuid.uuid4().hex
        request_id = _given_request_id(request) or ask_id
        call = Call(self._service, self._shape, request, request_id, ask_id)
        sent = _Sent(send, request_id)
        start = time.monotonic()
        name = f"{self._endpoint.method} {self._endpoint.path}"
        try:
            with self._service.tracing.request(name, request.headers, request_id):
                response = await self._admitted(call)
                if response is None:
                    await _unless_gone(receive, self._handle(call), scope, sent)
                else:
                    await response(scope, receive, sent)
        finally:
            _log_request(call, sent.status, time.monotonic() - start)

    async def _admitted(self, call: Call) -> Response | None:
        """Key and body; None when both are well, else what to answer."""
        try:
            config = self._service.config
            if not self._endpoint.open:
                _check_key(call.request, config.api_keys)
            _check_site(call.request, config.allowed_origins)
            await self._read_body(call)
        except Fault as fault:
            return fault_response(fault, self._shape)
        return None

    async def _read_body(self, call: Call) -> None:
        endpoint = self._endpoint
        if not endpoint.bodies:
            return
        value = await read_json(call.request, self._service.config.limits)
        if endpoint.parse is not None:
            call.body = endpoint.parse(value)
        elif endpoint.body is not None:
            call.body = as_model(endpoint.body, value)

    async def _handle(self, call: Call) -> Response:
        try:
            return await self._endpoint.handler(call)
        except Fault as fault:
            call.notes["fault"] = str(fault)
            return fault_response(fault, self._shape)
        except Exception:
            log.exception("an endpoint failed", extra={"request_id": call.request_id})
            return fault_response(Fault("failed", "Server internal error"), self._shape)


class _Sent:
    """Sends, with the request's id in the headers, and remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._headers = [(b"x-request-id", request_id.encode()), (b"requestuuid", request_id.encode())]
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], *self._headers]}
        await self._send(message)


def fault_response(fault: Fault, shape: Shape) -> Response:
    status, body = shape(fault)
    return JSONResponse(body, status, headers=fault.headers)


async def _unless_gone(receive: Receive, handled: Awaitable[Response], scope: Scope, send: Send) -> None:
    """Answers; a client that goes away before the end takes its request with it."""

    async def watch(scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch, group.cancel_scope)
        response = await handled
        await response(scope, receive, send)
        group.cancel_scope.cancel()


def _given_request_id(request: Request) -> str | None:
    """The client's, if it is one that can stand in a log."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else None


def _check_key(request: Request, keys: tuple[str, ...]) -> None:
    if not keys:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    # Every key is compared, in constant time: the answer's delay tells nothing.
    matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    if not any(matches):
        raise Fault("unauthorized", "Incorrect API key provided: send Authorization: Bearer KEY.")


def _check_site(request: Request, allowed: tuple[str, ...]) -> None:
    """A browser says when a page of another site asks: such a page could stop a service on loopback."""
    if request.headers.get("sec-fetch-site") not in ("cross-site", "same-site"):
        return
    if request.headers.get("origin") not in allowed and "*" not in allowed:
        raise Fault("forbidden", "Pages of other sites may not call: see --allowed_origin.")


def _log_request(call: Call, status: int | None, seconds: float) -> None:
    fields: MutableMapping[str, Any] = {
        "request_id": call.request_id,
        "ask_id": call.ask_id,
        "method": call.request.method,
        "path": call.request.url.path,
        "status": 499 if status is None else status,  # the client went away first
        "ms": round(1000 * seconds, 1),
        **call.notes,
    }
    level = logging.DEBUG if call.request.method == "GET" else logging.INFO
    log.log(level, "request", extra=dict(fields))

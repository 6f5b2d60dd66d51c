"""Streamed answers: events as they come, to a client that reads, and no longer to one that does not."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llm_boost.service.http_protocol import ABORT
from llm_boost.service.idle_timeout import IdleTimeout

SSE = "text/event-stream"
STREAMS = ("application/json", SSE)  # as the request chooses


class EventStream(Response):
    """Sends what a generator yields. `start` makes it: a fault before the first event keeps its status."""

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes, None], write_timeout: float, media_type: str
    ) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # a proxy is asked to pass events on at once
        self._first, self._rest, self._write_timeout = first, rest, write_timeout

    @classmethod
    async def start(
        cls, events: AsyncGenerator[bytes, None], write_timeout: float, media_type: str = SSE
    ) -> EventStream:
        try:
            return cls(await anext(events, b""), events, write_timeout, media_type)
        except BaseException:
            await events.aclose()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._rest):
            try:
                with IdleTimeout(self._write_timeout) as reading:
                    await reading.wait(send(self._start()))
                    await reading.wait(send(_body(self._first)))
                    async for event in self._rest:
                        await reading.wait(send(_body(event)))
                    await reading.wait(send({"type": "http.response.body", "body": b"", "more_body": False}))
            except TimeoutError:  # what it has not read yet is bounded by the transport's buffer
                scope["extensions"][ABORT]["abort"]()

    def _start(self) -> dict[str, object]:
        return {"type": "http.response.start", "status": 200, "headers": self.raw_headers}


def sse_event(value: Any) -> bytes:
    """A JSON value as one server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def _body(event: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": event, "more_body": True}

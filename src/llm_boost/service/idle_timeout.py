"""A limit on how long each of many short waits may take, for the price of one timer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class IdleTimeout:
    """TimeoutError from a wait that takes longer than `seconds`.

    A stream waits thousands of times. Its one timer looks now and then how long the present wait has lasted,
    so that a wait costs no timer of its own; one may take up to twice as long before it is noticed.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None  # when the present wait began
        self._task: asyncio.Task[Any] | None = None
        self._expired = False

    def __enter__(self) -> IdleTimeout:
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    async def wait(self, what: Awaitable[T]) -> T:
        self._task, self._since = asyncio.current_task(), self._loop.time()
        try:
            return await what
        except asyncio.CancelledError:
            if not self._expired:
                raise
            uncancel = getattr(self._task, "uncancel", None)  # from Python 3.11
            if uncancel is not None:
                uncancel()
            raise TimeoutError from None
        finally:
            self._since = None

    def _look(self) -> None:
        waited = 0.0 if self._since is None else self._loop.time() - self._since
        if waited < self._seconds or self._task is None:
            self._timer = self._loop.call_later(self._seconds - waited, self._look)
            return
        self._expired = True
        self._task.cancel()

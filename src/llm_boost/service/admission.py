"""The bounded queue before the engine: so many requests run, so many wait, the rest come back later."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llm_boost.service.faults import Fault

_LONGEST_RETRY_SECONDS = 60


class Admission:
    """Gives places to requests in the order of their arrival. For one event loop.

    Args:
        max_running: requests that the engine has at the same time.
        max_queued: requests that wait for a place.
        max_queued_tokens: prompt tokens of those that wait.
    """

    def __init__(self, max_running: int, max_queued: int, max_queued_tokens: int) -> None:
        self._max_running, self._max_queued = max_running, max_queued
        self._max_queued_tokens = max_queued_tokens
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._queued_tokens = 0
        self._mean_seconds = 1.0  # of a request, from place to end
        self.running = 0

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a request that came now would wait."""
        return self.running >= self._max_running

    def check(self, requests: int = 1) -> None:
        """A Fault, when that many more requests would not be let in; costs nothing to ask first."""
        if self.running + self.queued + requests > self._max_running + self._max_queued:
            raise self._overloaded(f"{self.running} requests run and {self.queued} wait, which is the limit")

    @asynccontextmanager
    async def place(self, tokens: int) -> AsyncIterator[None]:
        """A place among those that run, for a request of so many prompt tokens; a Fault if it is too late."""
        if self.busy or self._waiting:
            await self._wait(tokens)
        else:
            self.running += 1
        start = time.monotonic()
        try:
            yield
        finally:
            self._mean_seconds += 0.1 * (time.monotonic() - start - self._mean_seconds)
            self._leave()

    async def _wait(self, tokens: int) -> None:
        self.check()
        if self._queued_tokens + tokens > self._max_queued_tokens:
            raise self._overloaded(
                f"{self._queued_tokens} prompt tokens wait, and {self._max_queued_tokens} are the limit"
            )
        turn = asyncio.get_running_loop().create_future()
        entry = (turn, tokens)
        self._waiting.append(entry)
        self._queued_tokens += tokens
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the place came at the same moment
                self._leave()
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self._queued_tokens -= tokens
            raise

    def _leave(self) -> None:
        """Hands a place to whoever waits longest."""
        self.running -= 1
        while self._waiting and not self.busy:
            turn, tokens = self._waiting.popleft()
            self._queued_tokens -= tokens
            if not turn.cancelled():  # else its task has yet to hear of it
                self.running += 1
                turn.set_result(None)

    def _overloaded(self, reason: str) -> Fault:
        seconds = self._mean_seconds * (1 + self.queued / self._max_running)
        return Fault(
            "overloaded",
            f"The service is overloaded: {reason}",
            retry_after=min(max(round(seconds), 1), _LONGEST_RETRY_SECONDS),
        )

"""Where one reader finds the latest output of its request: never more than one, however slow it is."""

from __future__ import annotations

import asyncio
import threading

from llm_boost.engine.outputs import RequestOutput
from llm_boost.errors import LLMBoostError


class OutputSlot:
    """Filled by the engine's thread, emptied by a coroutine.

    An output that was not taken is replaced by the next one, which holds all of it: text and tokens are
    cumulative, and `delta` becomes what is new since the reader last took something.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._filled = asyncio.Event()
        self._lock = threading.Lock()
        self._output: RequestOutput | None = None
        self._error: LLMBoostError | None = None

    def put(self, output: RequestOutput) -> bool:
        """False when the reader's event loop is closed, and the reader with it."""
        with self._lock:
            left, self._output = self._output, output
            for new, old in zip(output.outputs, left.outputs if left else (), strict=False):
                new.delta = old.delta + new.delta
        return left is not None or self._wake()

    def fail(self, error: LLMBoostError) -> None:
        """No more outputs come."""
        self._error = error
        self._wake()

    async def take(self) -> RequestOutput:
        """The latest output, as soon as there is one; raises what `fail` was given."""
        while True:
            with self._lock:
                output, self._output = self._output, None
            if output is not None:
                return output
            if self._error is not None:
                raise type(self._error)(str(self._error)) from self._error.__cause__
            self._filled.clear()
            await self._filled.wait()

    def _wake(self) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._filled.set)
        except RuntimeError:  # the loop is closed
            return False
        return True

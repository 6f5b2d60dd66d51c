"""Where one reader finds the latest output of its request: never more than one, however slow it is."""

from __future__ import annotations

import asyncio
import threading
import weakref

from llm_boost.engine.outputs import RequestOutput
from llm_boost.errors import LLMBoostError


class OutputSlot:
    """Filled by the engine's thread, emptied by a coroutine.

    An output that was not taken is replaced by the next one, which holds all of it: text and tokens are
    cumulative, and `delta` becomes what is new since the reader last took something.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._bell = _bell_of(loop)
        self.filled = asyncio.Event()
        self._lock = threading.Lock()
        self._output: RequestOutput | None = None
        self._error: LLMBoostError | None = None

    def put(self, output: RequestOutput) -> bool:
        """False when the reader's event loop is closed, and the reader with it."""
        with self._lock:
            left, self._output = self._output, output
            for new, old in zip(output.outputs, left.outputs if left else (), strict=False):
                new.delta = old.delta + new.delta
        return left is not None or self._bell.ring(self)

    def fail(self, error: LLMBoostError) -> None:
        """No more outputs come."""
        self._error = error
        self._bell.ring(self)

    async def take(self) -> RequestOutput:
        """The latest output, as soon as there is one; raises what `fail` was given."""
        while True:
            with self._lock:
                output, self._output = self._output, None
            if output is not None:
                return output
            if self._error is not None:
                raise type(self._error)(str(self._error)) from self._error.__cause__
            self.filled.clear()
            await self.filled.wait()


class _Bell:
    """Wakes the readers of one event loop: a step's outputs, which come together, wake it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._lock = threading.Lock()
        self._rung: list[OutputSlot] = []

    def ring(self, slot: OutputSlot) -> bool:
        """False when the loop is closed."""
        with self._lock:
            self._rung.append(slot)
            if len(self._rung) > 1:
                return True
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._answer)
                return True
        except RuntimeError:  # it is closed
            pass
        self._rung.clear()
        return False

    def _answer(self) -> None:
        with self._lock:
            rung, self._rung = self._rung, []
        for slot in rung:
            slot.filled.set()


_bells: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell] = weakref.WeakKeyDictionary()


def _bell_of(loop: asyncio.AbstractEventLoop) -> _Bell:
    return _bells.setdefault(loop, _Bell(loop))

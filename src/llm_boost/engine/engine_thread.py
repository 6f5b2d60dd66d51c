"""An engine in a thread of its own: commands go in, outputs go to the reader of each request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

from llm_boost.engine.engine import Engine
from llm_boost.engine.outputs import RequestOutput
from llm_boost.engine.request import Request
from llm_boost.errors import EngineError, LLMBoostError, RequestError

T = TypeVar("T")


class Reader(Protocol):
    """Who waits for a request's outputs. Called from the engine's thread: must neither block nor raise."""

    def put(self, output: RequestOutput) -> bool:
        """False when nobody reads any more."""
        ...

    def fail(self, error: LLMBoostError) -> None: ...


class _Command(NamedTuple):
    work: Callable[[], Any]
    done: Future[Any]


class EngineThread:
    """Owns an engine: nothing else may touch it. The methods here are safe to call from any thread.

    Each reader gets the finished output of its request, or is failed once: when the engine dies.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: SimpleQueue[_Command] = SimpleQueue()
        self._readers: dict[str, Reader] = {}
        self._changed = threading.Condition()  # guards the readers and the flags below
        self._draining = self._closing = False
        self.error: EngineError | None = None  # set for good when the thread ends
        self._idle = True
        self._last_step_time = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="llm-boost-engine", daemon=True)
        self._thread.start()

    @property
    def last_step_time(self) -> float:
        """When the latest step began, in monotonic seconds; now, while there is nothing to do."""
        return time.monotonic() if self._idle else self._last_step_time

    def add(self, request: Request, reader: Reader) -> None:
        """Submits a request whose outputs go to `reader`.

        Raises:
            RequestError: a request of this name is under way. EngineError: the engine takes no more.
        """
        name = request.request_id
        with self._changed:
            self.check_accepts()
            if name in self._readers:
                raise RequestError(f"request_id: got {name!r}, which is running; allowed one that is not")
            self._readers[name] = reader
            self._inbox.put(_Command(lambda: self._submit(request), Future()))

    def abort(self, request_id: str) -> Future[bool]:
        """Ends a request; its reader gets the finished output. The result: whether it was under way."""
        return self.call(lambda: self._abort(request_id))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Has the engine's thread do something between two steps; an exception goes to the caller alone."""
        future: Future[T] = Future()
        with self._changed:
            self.check_health()
            self._inbox.put(_Command(work, future))
        return future

    def drain(self, timeout: float | None) -> bool:
        """Takes no more requests and waits, in seconds, for those under way; False if some still are."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._readers, timeout)

    def close(self) -> None:
        """Aborts what still runs, and ends the thread once its step is done."""
        with self._changed:
            if self.error is None:
                self._inbox.put(_Command(self._close, Future()))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def check_health(self) -> None:
        """EngineError when the thread has ended."""
        if self.error is not None:
            raise EngineError(str(self.error)) from self.error.__cause__

    def check_accepts(self) -> None:
        """EngineError when no request can be added any more."""
        self.check_health()
        if self._draining:
            raise EngineError("the engine is being drained: it takes no more requests")

    def _run(self) -> None:
        error = EngineError("the engine was closed")
        try:
            while not self._closing:
                self._obey(self._commands())
                self._last_step_time = time.monotonic()
                self._deliver(self._engine.step())
        except BaseException as fault:  # whatever it was, nobody may wait for ever
            error = EngineError(f"the engine stopped: {type(fault).__name__}: {fault}")
            error.__cause__ = fault
        finally:
            self._end(error)

    def _commands(self) -> Iterable[_Command]:
        """All that have come; waits for one where there is nothing else to do."""
        try:
            while True:
                self._idle = not self._engine.has_work
                command = self._inbox.get(block=self._idle)
                self._last_step_time = time.monotonic()
                self._idle = False
                yield command
        except Empty:
            return

    def _obey(self, commands: Iterable[_Command]) -> None:
        for work, done in commands:
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            if self._closing:
                return

    def _submit(self, request: Request) -> None:
        try:
            self._engine.submit(request)
        except LLMBoostError as error:
            self._take_reader(request.request_id).fail(error)

    def _abort(self, request_id: str) -> bool:
        output = self._engine.abort(request_id)
        self._deliver([output] if output else [])
        return output is not None

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            name = output.request_id
            reader = self._take_reader(name) if output.finished else self._readers[name]
            if not reader.put(output) and not output.finished:
                self._abort(name)

    def _take_reader(self, name: str) -> Reader:
        with self._changed:
            reader = self._readers.pop(name)
            self._changed.notify_all()
        return reader

    def _close(self) -> None:
        for name in list(self._readers):
            self._abort(name)
        self._closing = True

    def _end(self, error: EngineError) -> None:
        with self._changed:
            self.error = error
            readers, self._readers = list(self._readers.values()), {}
            self._changed.notify_all()
        for reader in readers:
            reader.fail(error)
        while not self._inbox.empty():
            self._inbox.get().done.set_exception(error)

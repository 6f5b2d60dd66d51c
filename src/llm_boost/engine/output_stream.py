"""The outputs of some requests as they come, from an engine that serves others too."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from llm_boost.engine.engine import Engine
from llm_boost.engine.outputs import RequestOutput
from llm_boost.errors import EngineError


class Outbox:
    """Steps an engine and puts each output before the stream that waits for it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._queues: dict[str, deque[RequestOutput]] = {}

    def open(self, request_ids: Iterable[str]) -> OutputStream:
        ids = list(request_ids)
        queue: deque[RequestOutput] = deque()
        self._queues.update(dict.fromkeys(ids, queue))
        return OutputStream(self, ids, queue)

    def step(self) -> None:
        for output in self.engine.step():
            self._queues[output.request_id].append(output)

    def close(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.engine.abort(request_id)
            self._queues.pop(request_id, None)


class OutputStream(Iterator[RequestOutput]):
    """Ends when its requests have; one that fails raises EngineError. Closing it aborts what still runs."""

    def __init__(self, outbox: Outbox, request_ids: list[str], queue: deque[RequestOutput]) -> None:
        self._outbox = outbox
        self._open = set(request_ids)
        self._queue = queue

    def __next__(self) -> RequestOutput:
        while not self._queue:
            if not self._open:
                raise StopIteration
            self._outbox.step()
        output = self._queue.popleft()
        if output.finished:
            self._open.remove(output.request_id)
            self._outbox.close([output.request_id])
        if output.error is not None:
            self.close()
            raise EngineError(f"request {output.request_id}: {output.error}")
        return output

    def close(self) -> None:
        self._outbox.close(self._open)
        self._open.clear()
        self._queue.clear()

    def __del__(self) -> None:
        self.close()

"""Notices an engine that has died or is stuck, says so on health, and ends the process."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time

from llm_boost.errors import EngineError
from llm_boost.service.logs import log
from llm_boost.service.service import Phase, Service

CHECK_SECONDS = 1.0
LAST_SECONDS = 5.0  # for health to say so, and for clients to get their errors


class Watchdog:
    """A thread, so that not even a stuck event loop escapes it."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        self._service, self._loop, self._timeout = service, loop, timeout
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="llm-boost-watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(CHECK_SECONDS, self._timeout / 4)):
            reason = self._fault()
            if reason is not None:
                self._end(reason)
                return

    def _fault(self) -> str | None:
        backend = self._service.backend
        try:
            backend.check_health()
        except EngineError as error:
            return str(error) if self._service.phase is Phase.READY else None
        seconds = time.monotonic() - backend.last_step_time
        if seconds > self._timeout:
            return f"the engine has made no progress for {seconds:.0f} s"
        return None

    def _end(self, reason: str) -> None:
        log.critical("the engine is lost", extra={"reason": reason})
        self._service.fail(reason)
        if not self._stopped.wait(LAST_SECONDS):
            self._loop.call_soon_threadsafe(self._service.stop_requested.set)
            if not self._stopped.wait(LAST_SECONDS):  # what is stuck does not let go
                end_process(1)


def end_process(code: int) -> None:
    """Ends it now, whatever its threads are doing; what was logged is written first."""
    for handler in logging.getLogger("llm_boost.service").handlers:
        listener = getattr(handler, "listener", None)
        if listener is not None:
            listener.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""Structured logs: a JSON object a line, rotated as LogConfig says, written by a thread of its own."""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llm_boost.config.service_config import LogSettings
from llm_boost.errors import ConfigError

log = logging.getLogger("llm_boost.service")

_LEVELS = {
    "verbose": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "none": logging.CRITICAL + 1,
}
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonLines(logging.Formatter):
    """json.dumps escapes every control character, so that no text from a client can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _PLAIN},
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


@contextmanager
def logging_to(settings: LogSettings) -> Iterator[None]:
    """Logs for as long as the block runs; what is left is written at its end.

    Raises:
        ConfigError: the log file cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if settings.path is not None:
        try:
            settings.path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(
                logging.handlers.RotatingFileHandler(
                    settings.path,
                    maxBytes=settings.max_bytes,
                    backupCount=max(settings.files - 1, 0),
                    encoding="utf-8",
                )
            )
        except OSError as error:
            raise ConfigError(f"LogConfig.logPath: cannot write {settings.path}: {error.strerror}") from None
    for handler in handlers:
        handler.setFormatter(JsonLines())
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(lines, *handlers)
    level = _LEVELS[settings.level]
    for name, lowest in (("llm_boost.service", level), ("uvicorn", max(level, logging.WARNING))):
        logger = logging.getLogger(name)
        handler = _Queue(lines)
        handler.listener = listener
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(lowest)
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        for name in ("llm_boost.service", "uvicorn"):
            logging.getLogger(name).handlers.clear()


class _Queue(logging.handlers.QueueHandler):
    """Hands the record over as it is: the extra fields stay fields."""

    listener: logging.handlers.QueueListener | None = None  # who writes what is handed over

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

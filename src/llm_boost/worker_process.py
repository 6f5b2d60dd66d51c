"""A process for work that may run wild: a line of JSON in, a line of JSON out, and it may be ended."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any


class WorkerProcess:
    """Runs a script, started when needed and again after a request broke it; serves one thread at a time.

    The script reads requests from standard input until that ends, and answers each on standard output. Its
    limits of time and memory are its own affair.
    """

    def __init__(self, script: Path) -> None:
        self._script = script
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._of_parent: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: str) -> tuple[dict[str, Any] | None, int]:
        """(the answer, 0), or (None, the process's exit status) when it ended instead. `request` is ASCII."""
        with self._lock:
            process = self._running()
            try:
                _pipe(process.stdin).write(request.encode("ascii") + b"\n")
                _pipe(process.stdin).flush()
                line = _pipe(process.stdout).readline()
            except BrokenPipeError:
                line = b""
            except BaseException:  # Ctrl-C: the answer to this request must not meet the next one
                process.kill()
                self._end()
                raise
            if line.endswith(b"\n"):
                answer: dict[str, Any] = json.loads(line)
                return answer, 0
            return None, self._end()

    def close(self) -> None:
        with self._lock:
            if self._process is not None:
                self._end()

    def _forget(self) -> None:
        """After a fork the process and its pipes are the parent's: leave them alone, and start another."""
        self._lock = threading.Lock()
        self._of_parent, self._process = self._process, None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(self._script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    def _end(self) -> int:
        process, self._process = self._process, None
        assert process is not None
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).close()
        try:
            status = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        _pipe(process.stdout).close()
        return status


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream

"""A service in a thread of this process, on real sockets of loopback."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from golden import model_dir
from llm_boost.backends import Backend
from llm_boost.backends.builtin import BuiltinBackend
from llm_boost.config.run_config import resolve
from llm_boost.config.service_config import ServiceConfig
from llm_boost.service.server import Running, run_service


class Live:
    """A running service, and a client of it."""

    def __init__(self, config: ServiceConfig, load: Callable[[Any], Backend]) -> None:
        self._ready = threading.Event()
        self.running: Running | None = None
        self.code: int | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(config, load), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)
        if self.error is not None:
            raise self.error
        assert self.running is not None
        self.service = self.running.service
        self.url = self.running.addresses["business"]
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def _run(self, config: ServiceConfig, load: Callable[[Any], Backend]) -> None:
        def ready(running: Running) -> None:
            self.running = running
            self._ready.set()

        try:
            self.code = run_service(config, load, ready)
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def stop(self) -> int | None:
        """Drains; the exit code."""
        if self.running is not None:
            self.running.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.http.close()
        return self.code

    def idle(self) -> bool:
        """Nothing runs, nothing waits, and every block came back."""
        stats = self.service.backend.stats()
        admission = self.service.admission
        return stats.num_running == stats.num_waiting == admission.running == admission.queued == 0 and (
            stats.num_used_blocks == 0
        )


def golden_loader(
    name: str, cache_dir: Path, before_step: Callable[[], None] | None = None, **options: Any
) -> Callable[[Any], Backend]:
    """Loads a golden model; `before_step` is called in the engine's thread before each of its steps."""
    flags = {"model": str(model_dir(name)), "dtype": "float32", "threads": 2, "cache_dir": str(cache_dir)}
    run = resolve(flags, None, {})
    sizes = {"max_model_len": 512, "num_blocks": 256, "max_num_seqs": 16, **options}

    def load(progress: Any) -> Backend:
        backend = BuiltinBackend.load(run, sizes, progress)
        if before_step is not None:
            runner: Any = backend._llm.engine.runner
            step = runner.run

            def run_after(batch: Any) -> Any:
                before_step()
                return step(batch)

            runner.run = run_after
        return backend

    return load


Serve = Callable[..., Live]

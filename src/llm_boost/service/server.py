"""The service's life: listen, load, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import uvicorn

from llm_boost.backends import Backend
from llm_boost.config.service_config import Plane, ServiceConfig
from llm_boost.errors import ConfigError, LLMBoostError
from llm_boost.service.app import build_app
from llm_boost.service.endpoint import PlaneName
from llm_boost.service.http_protocol import LimitedHttpProtocol
from llm_boost.service.logs import log, logging_to
from llm_boost.service.service import Service
from llm_boost.service.tls import tls_context
from llm_boost.service.tracing import tracing_to
from llm_boost.service.watchdog import Watchdog, end_process

READY_LINE = "Daemon start success!"
BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75

Load = Callable[[Callable[[int, int], None]], Backend]


@dataclass(frozen=True)
class Running:
    """A service that takes requests."""

    service: Service
    addresses: Mapping[PlaneName, str]  # where each plane is: http://127.0.0.1:8000
    loop: asyncio.AbstractEventLoop

    def stop(self) -> None:
        """Begins to drain; from any thread. Nothing happens when it has ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.service.stop_requested.set)


OnReady = Callable[[Running], None]


def run_service(config: ServiceConfig, load: Load, on_ready: OnReady) -> int:
    """Serves until it is told to stop; the exit code.

    Args:
        load: loads the model, in a thread, while health is served already; called with what to tell of its
            progress.
        on_ready: called once requests are taken.

    Raises:
        ConfigError: an address, a certificate or the log file cannot be used; nothing was loaded.
        CheckpointError and others: what `load` raises.
    """
    import uvloop

    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(config.log))
        servers = [stack.enter_context(_bound(*entry)) for entry in _addresses(config)]
        return uvloop.run(_serve(config, servers, load, on_ready))


class _Listening(uvicorn.Server):
    """One address; signals are the service's, not each server's."""

    planes: tuple[PlaneName, ...]
    sock: socket.socket

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def url(self) -> str:
        host, port = self.sock.getsockname()[:2]
        scheme = "https" if self.config.is_ssl else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _addresses(config: ServiceConfig) -> Iterator[tuple[Plane, tuple[PlaneName, ...]]]:
    """Planes of equal address share one server."""
    names: tuple[PlaneName, ...] = ("business", "management", "metrics")
    found: dict[tuple[str, int], tuple[Plane, list[PlaneName]]] = {}
    for name in names:
        plane: Plane = getattr(config, name)
        address = plane.host, plane.port or -id(plane)  # port 0 is another one for each plane
        found.setdefault(address, (plane, []))[1].append(name)
    for plane, planes in found.values():
        yield plane, tuple(planes)


@contextlib.contextmanager
def _bound(plane: Plane, planes: tuple[PlaneName, ...]) -> Iterator[tuple[Plane, tuple[PlaneName, ...], Any]]:
    family = socket.AF_INET6 if ":" in plane.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with contextlib.closing(sock):
        try:
            sock.bind((plane.host, plane.port))
        except OSError as error:
            raise ConfigError(
                f"{plane.host}:{plane.port} ({', '.join(planes)}): cannot listen there: {error.strerror}"
            ) from None
        yield plane, planes, sock


async def _serve(
    config: ServiceConfig,
    bound: list[tuple[Plane, tuple[PlaneName, ...], socket.socket]],
    load: Load,
    on_ready: OnReady,
) -> int:
    service = Service(config)
    service.tracing = tracing_to(config.otlp_endpoint)
    stop = _stop_on_signals(service)
    servers = [_server(service, *entry) for entry in bound]
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(service.tracing.close)
        for server in servers:
            await stack.enter_async_context(_running(server))
        backend = await _loaded(service, load)
        if backend is None:  # told to stop before it was loaded
            return 0
        service.start(backend)
        watchdog = Watchdog(service, asyncio.get_running_loop(), config.limits.watchdog_timeout)
        stack.callback(watchdog.stop)  # after the backend was closed: a stuck engine does not let itself be
        stack.callback(service.close)
        addresses = {name: server.url for server in servers for name in server.planes}
        log.info("ready", extra={"model": config.name, "addresses": addresses})
        on_ready(Running(service, addresses, asyncio.get_running_loop()))
        await stop.wait()
        return await _drained(service)


async def _loaded(service: Service, load: Load) -> Backend | None:
    """The backend, from a thread of its own; None when a signal came first, and the process ends at once."""

    def progress(done: int, total: int) -> None:
        service.load_progress = done / max(total, 1)

    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[Backend] = loop.create_future()

    def work() -> None:
        try:
            backend = load(progress)
        except BaseException as error:
            loop.call_soon_threadsafe(loaded.set_exception, error)
        else:
            loop.call_soon_threadsafe(loaded.set_result, backend)

    threading.Thread(target=work, name="llm-boost-load", daemon=True).start()
    stopped: asyncio.Future[Any] = asyncio.ensure_future(service.stop_requested.wait())
    await asyncio.wait([cast("asyncio.Future[Any]", loaded), stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if loaded.done():
        return loaded.result()
    end_process(0)  # the thread that loads cannot be interrupted; the packed cache survives that
    return None


def _stop_on_signals(service: Service) -> asyncio.Event:
    """SIGTERM or SIGINT once: drain. Twice: end now."""

    def stop(name: str) -> None:
        if service.stop_requested.is_set():
            log.warning("ends at once", extra={"signal": name})
            end_process(1)
        log.info("stops", extra={"signal": name})
        service.stop_requested.set()

    loop = asyncio.get_running_loop()
    with contextlib.suppress(RuntimeError, ValueError):  # not the main thread: nobody sends signals there
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number.name)
    return service.stop_requested


async def _drained(service: Service) -> int:
    if service.failure is not None:
        log.error("ends, since the engine failed", extra={"reason": service.failure})
        return 1
    limit = service.config.limits.drain_timeout
    whole = await service.drain(limit)
    log.info("drained" if whole else "ends with requests under way", extra={"limit_s": limit})
    return 0


def _server(service: Service, plane: Plane, planes: tuple[PlaneName, ...], sock: socket.socket) -> _Listening:
    context = None if plane.tls is None else tls_context(plane.tls)

    class Protocol(LimitedHttpProtocol):
        read_timeout = service.config.limits.read_timeout

    server = _Listening(
        uvicorn.Config(
            build_app(service, planes),
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
            ssl_context_factory=None if context is None else lambda config, default: context,
        )
    )
    server.planes, server.sock = planes, sock
    return server


@contextlib.asynccontextmanager
async def _running(server: _Listening) -> Any:
    """The server, listening inside of the block."""
    task = asyncio.create_task(server.serve(sockets=[server.sock]))
    while not server.started:
        if task.done():
            task.result()
            raise LLMBoostError(f"{server.url}: the server ended before it listened")
        await asyncio.sleep(0.005)
    try:
        yield server
    finally:
        server.should_exit = True
        await task

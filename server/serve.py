"""Serving until a signal or a failure ends it.

First SIGTERM or SIGINT: /ready turns 503, new requests are refused, running ones may finish within
`http.drain_seconds`; the port stays open meanwhile, so that clients get an answer. Then, or at a
second signal, what still runs gets an error and the process ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.api.grammar_threads import READER
from server.api.service import Service
from server.app import LOADER, Load, create_app
from server.config import HttpConfig, ServerConfig
from server.errors import ConfigError, CosError, EngineDead

logger = logging.getLogger(__name__)

# Answers that are being written when the engine has stopped get this long.
_FLUSH_SECONDS = 5
_POLL_SECONDS = 0.05


def serve(config: ServerConfig, load: Load | None = None) -> int:
    """Serve until the end; returns the exit code.

    Args:
        config: the whole configuration.
        load: makes the engine; loads the configured models if not given.

    Raises:
        ConfigError: the port cannot be had, or the models cannot be loaded.
    """
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    check_tls(config.http)
    app = create_app(config, load=load, on_failure=fail)
    server = DrainingServer(app, config.http)
    with _bind(config.http) as listener, _metrics_port(config.http, app.state.service):
        scheme = "http" if config.http.tls_certificate is None else "https"
        logger.info("listening on %s, loading models", _url(scheme, *listener.getsockname()[:2]))
        if not app.state.service.keys:
            logger.info("no API keys are configured: everybody who reaches the port is served")
        server.run(sockets=[listener])
    return _exit_code(failures)


def finish(code: int) -> int:
    """`code`, for `sys.exit`; ends the process at once where models or grammars are being read.

    While Python shuts down, a thread that comes back to it from native code is unwound through that
    code, and the process would abort; or Python waits for it.
    """
    if any(thread.name in (LOADER, READER) for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_tls(http: HttpConfig) -> None:
    """Raises ConfigError where uvicorn would fail, or ask for a password on the terminal."""
    if http.tls_certificate is None:
        if http.tls_key is not None:
            raise ConfigError("http.tls_key needs http.tls_certificate")
        return
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(http.tls_certificate, http.tls_key, password=lambda: "")
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ConfigError(
            f"http.tls_certificate, http.tls_key: cannot use {http.tls_certificate} with "
            f"{http.tls_key or 'the key in it'}: {reason}"
        ) from error


@contextmanager
def _metrics_port(http: HttpConfig, service: Service) -> Iterator[None]:
    """Serve /metrics on `http.metrics_port`, where there is one, as long as the context lasts."""
    if http.metrics_port is None:
        yield
        return
    try:
        server = service.metrics.serve(http.metrics_host, http.metrics_port)
    except OSError as error:
        where = f"{http.metrics_host}:{http.metrics_port}"
        raise ConfigError(
            f"cannot listen on {where} for metrics: {error.strerror or error}"
        ) from error
    logger.info("metrics on %s", _url("http", http.metrics_host, server.port))
    try:
        yield
    finally:
        server.close()


def _exit_code(failures: list[BaseException]) -> int:
    if not failures:
        return 0
    if isinstance(failures[0], CosError) and not isinstance(failures[0], EngineDead):
        raise failures[0]
    logger.error("stopped: the engine has failed: %s", failures[0])
    return 1


def _bind(http: HttpConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    try:
        listener = socket.create_server((http.host, http.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot listen on {http.host}:{http.port}: {reason}") from error
    # Connections inherit both. Without the first, an answer of more than one packet on a connection
    # that is used again waits for the client's acknowledgement, which is held back for 40 ms;
    # asyncio sets it only for sockets that were made with the protocol's number.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Without it one whose client reads nothing would stay for ever, since a closed connection
        # first sends what it still has.
        milliseconds = int(http.send_seconds * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return listener


class DrainingServer(uvicorn.Server):
    """uvicorn, with its own idea of what a signal means."""

    def __init__(self, app: FastAPI, http: HttpConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                http="h11",  # has a limit on the size of headers
                h11_max_incomplete_event_size=http.max_header_bytes,
                ssl_certfile=http.tls_certificate,
                ssl_keyfile=http.tls_key,
                log_config=None,
                access_log=False,
                timeout_keep_alive=http.keep_alive_seconds,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
                lifespan="on",
            )
        )
        self._service: Service = app.state.service
        self._drain_seconds = http.drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._num_signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would close the port now and raise the signal again at the end; a drained server
        # exits with code 0 instead.
        self._num_signals += 1
        if self._loop is None or not self.started:
            self.should_exit = True
        elif self._num_signals == 1:
            self._loop.call_soon_threadsafe(self._start_drain, sig)
        else:
            self._loop.call_soon_threadsafe(self._abort)

    def _start_drain(self, sig: int) -> None:
        logger.info("%s: draining", signal.Signals(sig).name)
        self._service.drain()
        self._drain = asyncio.create_task(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        deadline = time.monotonic() + self._drain_seconds
        # The engine rings no bell when it is idle.
        while self._service.num_open and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_SECONDS)
        await self._stop()

    def _abort(self) -> None:
        if self._drain is not None:
            self._drain.cancel()
        self._drain = asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        if self._service.num_open:
            logger.warning("ending %d unfinished sequences", self._service.num_open)
        await self._service.stop()
        self.should_exit = True

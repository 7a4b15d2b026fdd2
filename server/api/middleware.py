"""ASGI middlewares; none buffers a response, so streams and disconnects pass through."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs
from server.api.body import BodyTooLarge, ClientGone, read_body, replay
from server.api.errors import describe, envelope, error_response
from server.api.routes import RouteTable
from server.metrics import HttpMetrics

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
CLIENT_GONE = 499  # nobody reads it; it tells such requests apart in the metrics
_PRINTABLE = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIdMiddleware:
    """Every response carries X-Request-Id: the client's own if it is harmless, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _PRINTABLE.fullmatch(given) else f"req-{secrets.token_hex(12)}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        token = logs.request_id.set(request_id)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            logs.request_id.reset(token)


class CatchAllMiddleware:
    """Makes an unexpected error a 500 that says nothing of itself; the innermost.

    Starlette's own would raise it again after its answer, and uvicorn then drops the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def watch(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if scope["type"] != "http" or has_started:
                raise
            logger.exception("unexpected error in %s", scope["path"])
            await error_response(*describe(error))(scope, receive, send)


class HttpMetricsMiddleware:
    """Counts and times HTTP requests by route template."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, routes: RouteTable) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE  # where nothing is answered at all

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        try:
            await self._app(scope, receive, watch)
        except Exception:
            status = 500  # what it becomes further out
            raise
        finally:
            route = self._routes.template(scope)  # the router may never have seen the request
            seconds = time.perf_counter() - started
            self._metrics.observe(route, scope["method"], status, seconds)


class BodyLimitMiddleware:
    """Reads bodies up to a limit before anything else sees them; 413 above it, 408 if slow.

    Only what a route takes: the rest is the connection's to drop, once the answer has gone out.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: RouteTable,
        max_bytes: int,
        seconds: float,
        on_refusal: Callable[[str], None],
    ) -> None:
        self._app = app
        self._routes = routes
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._routes.takes_body(scope):
            await self._app(scope, receive, send)
            return
        refused: Response | None = None
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(scope, receive)
        except ClientGone:
            return
        except BodyTooLarge:
            refused = self._refusal(
                413, f"the body is larger than {self._max_bytes} bytes", "request_too_large"
            )
        except TimeoutError:
            refused = self._refusal(
                408, f"the body did not come within {self._seconds:g} seconds", "request_timeout"
            )
        if refused is not None:
            await refused(scope, receive, send)
        else:
            await self._app(scope, replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_bytes and "expect" in headers:
            raise BodyTooLarge  # the client waits for an answer before it sends anything
        return await read_body(receive, self._max_bytes)

    def _refusal(self, status: int, message: str, code: str) -> Response:
        self._on_refusal("too_large" if status == 413 else "too_slow")
        # A rest of the body may be unread, so the connection cannot be used again.
        headers = {"Connection": "close"}
        return error_response(
            status, envelope(message, "invalid_request_error", code=code), headers
        )

"""ASGI middlewares that turn requests away by their head alone: who asks, and how often."""

from __future__ import annotations

import logging
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.body import discard_body
from server.api.clients import ANONYMOUS, SCOPE_KEY, Client, Clients
from server.api.errors import describe, envelope, error_headers, error_response
from server.api.keys import KeyRing
from server.errors import RateLimited

logger = logging.getLogger(__name__)

# What answers without a key: probes, which tell nothing but that and which server runs.
OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/version"})

OnRefusal = Callable[[str], None]


class AuthMiddleware:
    """Everything but OPEN_PATHS needs a key, where there are keys; says whose it was."""

    def __init__(
        self, app: ASGIApp, keys: KeyRing, clients: Clients, max_bytes: int, on_refusal: OnRefusal
    ) -> None:
        self._app = app
        self._keys = keys
        self._clients = clients
        self._max_bytes = max_bytes
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The path as it is routed by: never the URL, of which a Host header is part.
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        name: str | None = ANONYMOUS
        if self._keys:
            name = self._keys.name_of(Headers(scope=scope).get("authorization", ""))
        if name is None:
            await self._refuse(scope, receive, send)
            return
        scope[SCOPE_KEY] = self._clients[name]
        await self._app(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._on_refusal("invalid_api_key")
        body = envelope(
            "a valid API key is needed, as in Authorization: Bearer KEY",
            "invalid_request_error",
            code="invalid_api_key",
        )
        headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
        await discard_body(receive, self._max_bytes)
        await error_response(401, body, headers)(scope, receive, send)


class AdmissionMiddleware:
    """Requests with a body hold a place from their head to the last byte of the answer."""

    def __init__(
        self, app: ASGIApp, clients: Clients, max_bytes: int, on_refusal: OnRefusal
    ) -> None:
        self._app = app
        self._clients = clients
        self._max_bytes = max_bytes
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client: Client | None = scope.get(SCOPE_KEY)
        if client is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            self._clients.check(client)
        except RateLimited as error:
            self._on_refusal("rate_limit")
            status, body = describe(error)
            await discard_body(receive, self._max_bytes)
            response = error_response(status, body, {**error_headers(error), "Connection": "close"})
            await response(scope, receive, send)
            return
        with self._clients.place(client):
            await self._app(scope, receive, send)

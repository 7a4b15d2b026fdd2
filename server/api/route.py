"""How bodies are read: strict JSON, parsed once, large ones beside the event loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool

# Above it a body is parsed and validated in a thread. Threads take turns of 5 ms: others wait for
# so long, and not until thousands of messages are read.
LARGE_BYTES = 256 << 10


class BodyField(Protocol):
    """The part of FastAPI's fields that is needed here."""

    def validate(
        self, value: Any, values: dict[str, Any], *, loc: tuple[int | str, ...]
    ) -> tuple[Any, list[dict[str, Any]]]: ...


class StrictJsonRequest(Request):
    """A request whose JSON may hold no NaN, no Infinity and no lone surrogates."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = from_json(await self.body(), allow_inf_nan=False)
            except ValueError as error:
                # What FastAPI expects from a body that is no JSON.
                raise json.JSONDecodeError(str(error), "", 0) from error
        return self._json

    async def read_beside(self, field: BodyField) -> None:
        """Have `json` return a validated body, which FastAPI takes as it is.

        Raises:
            RequestValidationError: it is JSON, and not as it should be.
        """
        body = await self.body()
        with suppress(ValueError):  # no JSON: `json` will say so
            self._json = await run_in_threadpool(_validated, body, field)


def _validated(body: bytes, field: BodyField) -> Any:
    value, errors = field.validate(from_json(body, allow_inf_nan=False), {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return value


class StrictJsonRoute(APIRoute):
    """Reads bodies through StrictJsonRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, field = super().get_route_handler(), self.body_field

        async def strict_handle(request: Request) -> Response:
            strict = StrictJsonRequest(request.scope, request.receive)
            is_json = "json" in strict.headers.get("content-type", "")
            if field is not None and is_json and len(await strict.body()) > LARGE_BYTES:
                await strict.read_beside(field)
            return await handle(strict)

        return strict_handle

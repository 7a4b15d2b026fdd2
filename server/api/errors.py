"""Every error as OpenAI's envelope, and the one place that maps errors to HTTP statuses.

{"error": {"message": str, "type": str, "param": str | null, "code": str | null}}

RequestError          its own status (400, 404)   invalid_request_error
malformed body        400, never FastAPI's 422    invalid_request_error
route, method, size   404, 405, 413               invalid_request_error
bad API key           401                         invalid_request_error
EngineOverloaded      429 and Retry-After         rate_limit_error
RateLimited           429 and Retry-After         rate_limit_error
RequestTimeout        504                         server_error
EngineDraining        503 and Retry-After         server_error
ThreadsBusy           503 and Retry-After         server_error
anything else         500                         server_error
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from server.api.routes import routes_of
from server.api.service import service_of
from server.errors import (
    CosError,
    EngineDead,
    EngineDraining,
    EngineOverloaded,
    GenerationFailed,
    RateLimited,
    RequestError,
    RequestTimeout,
    ThreadsBusy,
)

logger = logging.getLogger(__name__)

MAX_PROBLEMS = 10
MAX_INPUT_CHARS = 200


class ErrorBody(BaseModel):
    """What went wrong; all four keys are always present."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorBody


# What every route may answer besides success, for the OpenAPI document.
_MEANINGS: dict[int | str, str] = {
    400: "The request is malformed or asks for what is not supported.",
    401: "No valid API key came with the request.",
    404: "No such model or route.",
    405: "The route does not take this method.",
    408: "The body came too slowly.",
    413: "The body is larger than the server allows.",
    429: "The queue is full, or this client's limits are reached; try again later.",
    500: "The server failed.",
    503: "The server is starting, shutting down, or busy with others' templates and forms.",
    504: "The request took longer than this server allows.",
    "default": "Any other error.",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope, "description": meaning}
    for status, meaning in _MEANINGS.items()
}

# Messages repeat numbers of the client's own, and JSON's may have thousands of digits.
_LONG_NUMBER = re.compile(r"(\d{40})\d+")
GENERATION_FAILED = "generation_failed"
TIMEOUT = "timeout"
_STATUS: dict[type[CosError], tuple[int, str, str | None]] = {
    EngineOverloaded: (429, "rate_limit_error", "queue_full"),
    EngineDraining: (503, "server_error", "unavailable"),
    ThreadsBusy: (503, "server_error", "busy"),
    GenerationFailed: (500, "server_error", GENERATION_FAILED),
    RequestTimeout: (504, "server_error", TIMEOUT),
}
_RETRY_AFTER = {429: "1", 503: "5"}


def envelope(
    message: str, type: str, param: str | None = None, code: str | None = None
) -> ErrorEnvelope:
    return ErrorEnvelope(error=ErrorBody(message=message, type=type, param=param, code=code))


def describe(error: Exception) -> tuple[int, ErrorEnvelope]:
    """Status and body of any error. An unexpected one says nothing of itself to the client."""
    if isinstance(error, RequestError):
        message = _LONG_NUMBER.sub(r"\1...", str(error))
        body = envelope(message, "invalid_request_error", error.param, error.code)
        return error.status, body
    if isinstance(error, RateLimited):
        return 429, envelope(str(error), "rate_limit_error", code=error.code)
    if isinstance(error, EngineDead):
        # Why is for the log: it is some exception's text, paths and all.
        return 500, envelope("the engine has failed", "server_error", code="engine_dead")
    if isinstance(error, CosError):
        status, type_, code = _STATUS.get(type(error), (500, "server_error", None))
        return status, envelope(str(error), type_, code=code)
    return 500, envelope("internal server error", "server_error", code="internal_error")


def rejection_reason(error: RequestError | CosError) -> str | None:
    """Label of cos_requests_rejected_total; None for errors that are no rejection."""
    if isinstance(error, RequestError):
        known = {"context_length_exceeded", "model_not_found", "unsupported_parameter"}
        return error.code if error.code in known else "validation"
    if isinstance(error, EngineOverloaded):
        return "queue_full"
    return "unavailable" if isinstance(error, EngineDraining | ThreadsBusy) else None


def error_headers(error: Exception) -> dict[str, str]:
    """Of the response that tells of an error, besides those of its status."""
    return {"Retry-After": str(error.retry_after)} if isinstance(error, RateLimited) else {}


def error_response(
    status: int, body: ErrorEnvelope, headers: Mapping[str, str] | None = None
) -> Response:
    retry = {"Retry-After": _RETRY_AFTER[status]} if status in _RETRY_AFTER else {}
    merged = {**retry, **(headers or {})}
    if body.error.code in (GENERATION_FAILED, TIMEOUT):
        merged["x-should-retry"] = "false"  # OpenAI's clients would; the same would happen again
    return Response(body.model_dump_json(), status, merged, media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Whatever a route or the router raises on purpose; the rest is CatchAllMiddleware's."""
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(CosError, _on_cos_error)


async def _on_cos_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, CosError)
    reason = rejection_reason(error)
    if reason is not None:
        service_of(request).metrics.reject(reason)
    status, body = describe(error)
    return error_response(status, body)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    service_of(request).metrics.reject("validation")
    problems = [dict(item) for item in error.errors()[:MAX_PROBLEMS]]
    message = "; ".join(_problem(item) for item in problems)
    is_json = problems[0]["type"] != "json_invalid"  # its location is an offset, not a field
    param = _path(problems[0]["loc"]) or None if is_json else None
    return error_response(400, envelope(message, "invalid_request_error", param))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:MAX_INPUT_CHARS]
    message = {
        404: f"unknown route: {request.method} {path}",
        405: f"{path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    type_ = "invalid_request_error" if error.status_code < 500 else "server_error"
    headers = dict(error.headers or {})
    if error.status_code == 405 and (methods := routes_of(request).methods(request.scope)):
        headers["Allow"] = ", ".join(methods)  # Starlette's are those of one route of the path
    return error_response(error.status_code, envelope(message, type_), headers)


def _problem(item: dict[str, Any]) -> str:
    if item["type"] == "json_invalid":
        return f"the body is not valid JSON: {item['ctx']['error']}"
    where = _path(item["loc"])
    given = item.get("input")
    if not where:
        return _no_body(given)
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{where} is required"
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    # The type stays in the text: clients tell greater_than_equal from less_than_equal by it.
    return f"{where}: {message} ({item['type']}; got {_shown(given)})"


def _no_body(given: object) -> str:
    if isinstance(given, bytes):
        return "the body must be sent with content type application/json"
    return "the body must be a JSON object"


def _shown(value: object) -> str:
    """At most MAX_INPUT_CHARS of the client's own input; a large one is not even formatted."""
    if isinstance(value, str):
        shown = repr(value[:MAX_INPUT_CHARS])
    elif isinstance(value, list | dict):
        shown = f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    else:
        shown = repr(value)
    return shown if len(shown) <= MAX_INPUT_CHARS else shown[:MAX_INPUT_CHARS] + "..."


# Tags that pydantic puts into the path of a union's problem; no field of the request.
_TAGS = frozenset(
    {"weighted", "contrastive", "linear", "string", "parts", "of_prompt", "of_messages"}
)


def _path(location: Sequence[int | str]) -> str:
    """`("body", "cos", "gamma", 0)` -> `cos.gamma.0`; empty for the body itself."""
    parts = [str(part)[:64] for part in location[1:] if part not in _TAGS]
    return ".".join(parts)[:MAX_INPUT_CHARS]

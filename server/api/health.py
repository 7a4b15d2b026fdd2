"""GET /health, /ready, /ping, /version and /metrics: for probes and monitors."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from server import __version__
from server.api.errors import ERROR_RESPONSES
from server.api.service import Phase, service_of
from server.metrics import CONTENT_TYPE

router = APIRouter(tags=["operation"])
# Of its own: it may have a port of its own.
metrics_router = APIRouter(tags=["operation"])


class Status(BaseModel):
    """Answer of a probe."""

    status: Literal["ok", "unavailable"]
    phase: Phase


class Version(BaseModel):
    """Of this server."""

    version: str


_PROBE: dict[int | str, dict[str, Any]] = {503: {"model": Status, "description": "Not now."}}


@router.head("/health", include_in_schema=False)
@router.head("/ping", include_in_schema=False)
@router.post("/ping", response_model=Status, responses=_PROBE)  # as some load balancers ask
@router.get("/health", response_model=Status, responses=_PROBE)
@router.get("/ping", response_model=Status, responses=_PROBE)
async def health(request: Request) -> Response:
    """Alive: 200 while loading, serving and draining, 503 once the engine has failed."""
    phase = service_of(request).phase
    return _answer(phase, is_ok=phase != "failed")


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_model=Status, responses=_PROBE)
async def ready(request: Request) -> Response:
    """Takes requests: 503 while loading, draining and after a failure."""
    phase = service_of(request).phase
    return _answer(phase, is_ok=phase == "ready")


@router.head("/version", include_in_schema=False)
@router.get("/version")
async def version() -> Version:
    """This server's version."""
    return Version(version=__version__)


@metrics_router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus text format.", "content": {"text/plain": {}}},
        401: ERROR_RESPONSES[401],
    },
)
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    # A plain route: a mounted application would redirect /metrics to /metrics/.
    return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE)


def _answer(phase: Phase, *, is_ok: bool) -> Response:
    status = Status(status="ok" if is_ok else "unavailable", phase=phase)
    code = 200 if is_ok else 503
    return Response(status.model_dump_json(), code, media_type="application/json")

"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from server.api.errors import ERROR_RESPONSES
from server.api.service import Service, service_of

router = APIRouter(tags=["models"])


class ModelCard(BaseModel):
    """The served ensemble; to its clients it is one model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cos-server"
    root: str
    parent: str | None = None
    max_model_len: int
    members: list[str]


class ModelList(BaseModel):
    """All that is served: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models", responses=ERROR_RESPONSES)
async def list_models(request: Request) -> ModelList:
    """The served models."""
    return ModelList(data=[_card(service_of(request))])


# A served name may hold slashes, as hub ids do.
@router.head("/v1/models/{name:path}", include_in_schema=False)
@router.get("/v1/models/{name:path}", responses=ERROR_RESPONSES)
async def get_model(request: Request, name: str) -> ModelCard:
    """One served model."""
    service = service_of(request)
    service.check_model(name)
    return _card(service)


def _card(service: Service) -> ModelCard:
    service.check_ready()
    config = service.config
    return ModelCard(
        id=config.served_model_name,
        created=service.started_at,
        root=config.served_model_name,
        max_model_len=service.engine.max_length,
        members=[model.name for model in config.models],
    )

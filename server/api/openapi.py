"""The OpenAPI document, true to what is served.

FastAPI knows neither streams nor which errors an operation can answer with. Both are put right
here: errors of bodies go where there are none, and a stream's events are described.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from server.api.chat_protocol import ChatCompletionChunk
from server.api.completion_protocol import Completion

_STREAMS: dict[str, type[BaseModel]] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": ChatCompletionChunk,
}
_EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "One, two, three,", "max_tokens": 8, "temperature": 0},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Count to five."}],
        "max_tokens": 8,
        "seed": 1,
    },
}
_REF = "#/components/schemas/{model}"
# 405 is answered where there is no operation.
_NOWHERE = {"default", "405"}
_OF_BODIES = {"400", "408", "413", "429", "504"}


def install_openapi(app: FastAPI, served_model_name: str) -> None:
    """Make `app` describe itself once it is asked to."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _corrected(describe(), served_model_name)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _corrected(document: dict[str, Any], served_model_name: str) -> dict[str, Any]:
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status in _impossible(path, method) & operation["responses"].keys():
                del operation["responses"][status]
    for path, chunk in _STREAMS.items():
        _describe_stream(document["paths"][path]["post"], chunk, schemas)
    for path, example in _EXAMPLES.items():
        [body] = document["paths"][path]["post"]["requestBody"]["content"].values()
        body["example"] = {"model": served_model_name, **example}
    # The one value that is not a 404.
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        schemas[name]["properties"]["model"]["enum"] = [served_model_name]
    [parameter] = document["paths"]["/v1/models/{name}"]["get"]["parameters"]
    parameter["schema"]["enum"] = [served_model_name]
    return document


def _impossible(path: str, method: str) -> set[str]:
    """Statuses that an operation never answers with."""
    if method == "post":
        return _NOWHERE
    return _NOWHERE | _OF_BODIES | (set() if "{" in path else {"404"})


def _describe_stream(
    operation: dict[str, Any], chunk: type[BaseModel], schemas: dict[str, Any]
) -> None:
    """What each event holds; OpenAPI 3.1 has no word for it, so it is in an extension."""
    described = chunk.model_json_schema(mode="serialization", ref_template=_REF)
    for name, schema in described.pop("$defs", {}).items():
        schemas.setdefault(name, schema)
    schemas.setdefault(chunk.__name__, described)
    names = (chunk.__name__, "ErrorEnvelope")
    operation["responses"]["200"]["content"]["text/event-stream"] = {
        "schema": {
            "type": "string",
            "description": "Where `stream` is true: events of the form `data: ...`, each with the "
            f"JSON of a {chunk.__name__}; one with an ErrorEnvelope ends it early. The last event "
            "is `data: [DONE]`.",
        },
        "x-event-schema": {"anyOf": [{"$ref": _REF.format(model=name)} for name in names]},
    }

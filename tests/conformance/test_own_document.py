"""What streams carry, against this server's own OpenAPI document; bodies are test_fuzzed.py's."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.api.conftest import Live
from tests.support.api import IMPOSSIBLE, MODEL

PATHS = ("/v1/completions", "/v1/chat/completions")


def validator(document: dict[str, Any], path: str) -> Draft202012Validator:
    """Of one event of the stream of `path`."""
    response = document["paths"][path]["post"]["responses"]["200"]
    schema = response["content"]["text/event-stream"]["x-event-schema"]
    return Draft202012Validator({**schema, "components": document["components"]})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("has_logprobs", [False, True])
def test_events(live: Live, path: str, has_logprobs: bool) -> None:
    document = live.http.get("/openapi.json").json()
    options: dict[str, Any] = {"max_tokens": 8, "n": 2, "return_token_ids": True}
    options["stream_options"] = {"include_usage": True}
    if path == "/v1/completions":
        events = live.stream(**options, logprobs=2 if has_logprobs else None)
    else:
        events = live.stream_chat(**options, logprobs=has_logprobs)
    valid = validator(document, path)
    assert len(events) > 2
    for event in events:
        assert list(valid.iter_errors(event)) == []
    assert list(valid.iter_errors({**events[0], "choices": [{}]}))
    assert list(valid.iter_errors({"error": {"message": "no"}}))


def test_what_is_declared(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    operations = {
        (method, path): set(operation["responses"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    for path in PATHS:
        assert operations["post", path] >= {"200", "400", "404", "413", "429", "500", "503"}
    assert "400" not in operations["get", "/v1/models"]
    for statuses in operations.values():
        assert not statuses & {"default", "405", "422"}
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        assert document["components"]["schemas"][name]["properties"]["model"]["enum"] == [MODEL]


def test_a_failure_is_declared(live: Live) -> None:
    response = live.post(**IMPOSSIBLE)
    document = live.http.get("/openapi.json").json()
    declared = document["paths"]["/v1/completions"]["post"]["responses"]
    schema = declared[str(response.status_code)]["content"]["application/json"]["schema"]
    valid = Draft202012Validator({**schema, "components": document["components"]})
    assert list(valid.iter_errors(response.json())) == []

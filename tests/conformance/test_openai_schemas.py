"""Bodies, chunks and errors against OpenAI's own document.

Exemptions, each where OpenAI's service itself departs from its document:

1. A completion's stream shares the schema of the whole body, in which `finish_reason` is never
   null; before the end of a text there is none.
2. The same schema lets `usage` be absent but not null, while `include_usage` promises null in
   every chunk but the last.
3. The first token of an echoed prompt has no probability: its `token_logprobs` and `top_logprobs`
   are null.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Live
from tests.conformance.openai_document import OpenAIDocument, Schema, or_null
from tests.support.api import IMPOSSIBLE, MAX_LENGTH, MODEL

Exempt = dict[str, Schema]
SHORT: dict[str, Any] = {"max_tokens": 6, "seed": 1}
USAGE = {"stream_options": {"include_usage": True}}
EVERY_CHUNK = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def null_in_streams(schemas: Exempt) -> None:
    """Exemptions 1 and 2."""
    properties = schemas["CreateCompletionResponse"]["properties"]
    choice = properties["choices"]["items"]["properties"]
    choice["finish_reason"] = or_null(choice["finish_reason"])
    properties["usage"] = or_null(properties["usage"])


def null_in_echoes(schemas: Exempt) -> None:
    """Exemption 3, and those of streams."""
    null_in_streams(schemas)
    choice = schemas["CreateCompletionResponse"]["properties"]["choices"]["items"]["properties"]
    [logprobs, _] = choice["logprobs"]["anyOf"]
    for name in ("token_logprobs", "top_logprobs"):
        items = logprobs["properties"][name]
        items["items"] = or_null(items["items"])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"n": 3, "cos": {"strategy": "speculative"}},
    {"return_token_ids": True, "return_tokens_as_token_ids": True},
    {"stop": ["1"], "include_stop_str_in_output": True, "max_tokens": 100},
    {"stop_token_ids": list(range(20)), "max_tokens": 100},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_completions(
    live: Live, openai_document: OpenAIDocument, options: dict[str, Any], logprobs: int | None
) -> None:
    body = live.complete(**SHORT | options, logprobs=logprobs)
    assert openai_document.problems("CreateCompletionResponse", body) == []
    for streaming in ({}, USAGE, EVERY_CHUNK):
        for chunk in live.stream(**SHORT | options, logprobs=logprobs, **streaming):
            problems = openai_document.problems("CreateCompletionResponse", chunk, null_in_streams)
            assert problems == []


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echoes(live: Live, openai_document: OpenAIDocument, max_tokens: int) -> None:
    options: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": max_tokens}
    name = "CreateCompletionResponse"
    for body in [live.complete(**options), *live.stream(**options)]:
        assert openai_document.problems(name, body, null_in_echoes) == []
    assert openai_document.problems(name, live.complete(**options)), "the exemption is needed"
    assert not openai_document.problems(name, live.complete(**{**options, "logprobs": None}))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "logprobs", [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}]
)
def test_chat_completions(
    live: Live, openai_document: OpenAIDocument, options: dict[str, Any], logprobs: dict[str, Any]
) -> None:
    body = live.chat(**SHORT | options, **logprobs)
    assert openai_document.problems("CreateChatCompletionResponse", body) == []
    for streaming in ({}, USAGE, EVERY_CHUNK):
        for chunk in live.stream_chat(**SHORT | options, **logprobs, **streaming):
            assert openai_document.problems("CreateChatCompletionStreamResponse", chunk) == []


def test_models(live: Live, openai_document: OpenAIDocument) -> None:
    models = live.http.get("/v1/models").json()
    assert openai_document.problems("ListModelsResponse", models) == []
    model = live.http.get(f"/v1/models/{MODEL}").json()
    assert openai_document.problems("Model", model) == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"temperature": 9}, 400),
        ({"suffix": "1"}, 400),
        ({"prompt": [1] * MAX_LENGTH}, 400),
        ({"model": "gpt-4"}, 404),
        ({"prompt": "1" * (5 << 20)}, 413),
        (IMPOSSIBLE, 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(
    live: Live, openai_document: OpenAIDocument, body: dict[str, Any], status: int, stream: bool
) -> None:
    body = {"model": MODEL, "prompt": "1", "stream": stream} | body if body else {}
    response = live.http.post("/v1/completions", json=body)
    assert response.status_code == status
    assert openai_document.problems("ErrorResponse", response.json()) == []


def test_errors_of_routes(live: Live, openai_document: OpenAIDocument) -> None:
    for method, path in (("GET", "/v1/none"), ("PUT", "/v1/models"), ("GET", "/v1/models/none")):
        response = live.http.request(method, path)
        assert response.status_code in (404, 405)
        assert openai_document.problems("ErrorResponse", response.json()) == []


def test_the_document_would_find_mistakes(live: Live, openai_document: OpenAIDocument) -> None:
    chat = live.chat(**SHORT, logprobs=True)
    assert set(openai_document.schemas) > {"CompletionUsage", "ChatCompletionTokenLogprob", "Error"}
    del chat["choices"][0]["message"]["refusal"]
    chat["choices"][0]["logprobs"]["content"][0]["logprob"] = "high"
    chat["usage"]["prompt_tokens"] = None
    assert len(openai_document.problems("CreateChatCompletionResponse", chat)) >= 3
    flat = {"message": "no", "type": "x", "code": 400}
    assert openai_document.problems("ErrorResponse", flat)
    assert openai_document.problems("ErrorResponse", {"error": flat | {"param": None}})


def test_every_exemption_is_needed(live: Live, openai_document: OpenAIDocument) -> None:
    chunks = live.stream(**SHORT, **USAGE)
    problems = [openai_document.problems("CreateCompletionResponse", each) for each in chunks]
    assert any("finish_reason: None" in problem for each in problems for problem in each)
    assert any("usage: None" in problem for each in problems for problem in each)

"""Replies that call tools, against OpenAI's own document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.openai_document import OpenAIDocument
from tests.support.callers import NAMED, REQUIRED, TOOLS, Caller, run_caller


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    with run_caller("hermes", tmp_path_factory.mktemp("pair")) as caller:
        yield caller


@pytest.mark.parametrize("fields", [REQUIRED, NAMED, {"tools": TOOLS}])
def test_bodies_and_chunks(
    caller: Caller, openai_document: OpenAIDocument, fields: dict[str, Any]
) -> None:
    body = caller.post(**fields, seed=1).json()
    assert openai_document.problems("CreateChatCompletionResponse", body) == []
    for chunk in caller.stream(**fields, seed=1):
        assert openai_document.problems("CreateChatCompletionStreamResponse", chunk) == []

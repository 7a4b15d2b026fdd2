"""Tokens of texts and conversations, and the other way round."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Live
from tests.api.test_errors import error_of
from tests.support.api import MAX_LENGTH, MODEL, VOCAB_SIZE

MESSAGES = [{"role": "user", "content": "1 2"}]


def test_tokens_of_a_text(live: Live) -> None:
    body = live.http.post("/tokenize", json={"model": MODEL, "prompt": "1 2 a"}).json()
    assert body == {
        "count": 3,
        "max_model_len": MAX_LENGTH,
        "tokens": [1, 2, 10],
        "token_strs": None,
    }
    assert live.http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_tokens_of_a_conversation(live: Live) -> None:
    options = {"messages": MESSAGES, "add_generation_prompt": False, "return_token_strs": True}
    body = live.http.post("/tokenize", json=options).json()
    assert body["tokens"] == [30, 1, 2]
    assert body["token_strs"] == ["u", "1 ", "2 "]


def test_text_of_tokens(live: Live) -> None:
    assert live.http.post("/detokenize", json={"tokens": [1, 10]}).json() == {"prompt": "1 a"}
    assert live.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": [1]}, 400, "prompt"),
        ("/tokenize", {"prompt": "1", "add_special_tokens": 1}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "1", "model": "gpt-4"}, 404, "model"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ("/tokenize", {"messages": MESSAGES, "tools": [{}]}, 400, "tools.0.type"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, 400, "chat_template"),
        (
            "/tokenize",
            {"messages": MESSAGES, "chat_template_kwargs": {"tokenize": True}},
            400,
            "chat_template_kwargs.tokenize",
        ),
        ("/tokenize", [], 400, None),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["1"]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [1], "model": "gpt-4"}, 404, "model"),
    ],
)
def test_refusals(live: Live, path: str, body: Any, status: int, param: str | None) -> None:
    response = live.http.post(path, json=body)
    assert response.status_code == status, response.text
    assert error_of(response)["param"] == param


def test_tokenizer_info_without_models(live: Live) -> None:
    body = live.http.get("/tokenizer_info").json()
    assert body["vocab_size"] == VOCAB_SIZE
    assert body["eos_token"] is None
    assert body["chat_template"]


def test_more_tokens_than_texts_have_characters_are_refused(start) -> None:
    live = start(http={"max_prompt_chars": 5})
    assert live.http.post("/detokenize", json={"tokens": [1] * 5}).status_code == 200
    error = error_of(live.http.post("/detokenize", json={"tokens": [1] * 6}))
    assert (error["param"], error["message"]) == (
        "tokens",
        "tokens: 6 tokens is above this server's limit 5",
    )

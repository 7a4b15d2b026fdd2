"""Bodies of megabytes that are well-formed, and cost others little."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest
from pydantic_core import from_json

from server.api import route
from server.api.protocol import MOST_ITEMS
from tests.api.conftest import Live
from tests.api.test_errors import error_of
from tests.support.api import MODEL

PADDING = " " * route.LARGE_BYTES
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "1 2"}]


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Threads that parsed a body."""
    found: list[int] = []

    def note(*args: Any, **options: Any) -> Any:
        found.append(threading.get_ident())
        return from_json(*args, **options)

    monkeypatch.setattr(route, "from_json", note)
    return found


def send(live: Live, path: str, body: dict[str, Any], padding: str = PADDING) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return live.http.post(path, content=json.dumps(body) + padding, headers=headers)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": MODEL, "prompt": "1 2", "max_tokens": 2, "user": "me"}),
        (CHAT, {"model": MODEL, "messages": HI, "max_tokens": 2}),
        ("/tokenize", {"prompt": "1 2"}),
        ("/tokenize", {"messages": HI}),
        ("/detokenize", {"tokens": [1, 2]}),
        ("/v1/completions", {"model": MODEL, "prompt": 1, "n": "x"}),
        (CHAT, {"model": MODEL, "messages": [{"role": 1}]}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {}),
        ("/v1/completions", {"model": MODEL, "prompt": "1", "suffix": "2"}),
    ],
)
def test_a_large_body_is_read_beside_and_answered_alike(
    live: Live, readers: list[int], path: str, body: dict[str, Any]
) -> None:
    body |= {"seed": 3}
    small, large = send(live, path, body, ""), send(live, path, body)
    assert small.status_code == large.status_code
    if small.status_code == 200 and "choices" in small.json():
        assert small.json()["choices"] == large.json()["choices"]
    else:
        assert small.json() == large.json()
    assert len(set(readers)) == 2, "once on the loop, once in a thread"


def test_a_large_body_that_is_no_json(live: Live) -> None:
    headers = {"content-type": "application/json"}
    for padding in ("", PADDING):
        response = live.http.post(CHAT, content='{"model": nothing}' + padding, headers=headers)
        assert response.status_code == 400
        assert error_of(response)["message"].startswith("the body is not valid JSON")
    response = live.http.post(CHAT, content="{}" + PADDING, headers={"content-type": "text/plain"})
    assert "content type application/json" in error_of(response)["message"]


def test_parts_and_calls_of_all_messages_are_bounded_together(live: Live) -> None:
    part: list[Any] = [{"type": "text", "text": ""}]
    call = [{"function": {"name": "f"}}]
    few = {"role": "user", "content": part * 99}
    calls = {"role": "assistant", "content": "", "tool_calls": call * 99}
    for messages in ([few] * 166, [calls] * 166, [few, calls] * 83):
        error = error_of(live.post_chat(messages=messages))
        assert error["param"] == "messages"
        assert f"at most {MOST_ITEMS} parts and calls" in error["message"]
    assert "parts and calls" not in error_of(live.post_chat(messages=[few] * 165))["message"]

"""docs/api.md names every field that a request may have, and every one that is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.api.chat_protocol import ChatCompletionRequest
from server.api.completion_protocol import CompletionRequest
from server.api.conversation import REFUSED_IN_MESSAGES
from server.api.protocol import CosOptions, CosReport
from server.api.unsupported import REFUSED, REFUSED_IN_CHAT, REFUSED_IN_COMPLETIONS
from server.config import HttpConfig
from tests.api.conftest import Live

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def names(text: str) -> set[str]:
    return set(re.findall(r"`([a-z_]+)`", text))


@pytest.mark.parametrize(
    ("model", "title"),
    [
        (CompletionRequest, "Only `/v1/completions`"),
        (ChatCompletionRequest, "Only `/v1/chat/completions`"),
    ],
)
def test_every_field_is_documented(model: type, title: str) -> None:
    fields = set(model.model_fields)  # type: ignore[attr-defined]
    documented = names(section("Fields of both endpoints")) | names(section(title))
    assert fields <= documented


def test_every_refusal_is_documented() -> None:
    both, completions, chat, messages = re.split("In [a-z]+ also:", section("Refused"))
    assert names(both.split(":\n", 1)[1]) == set(REFUSED)
    assert names(completions) == set(REFUSED_IN_COMPLETIONS) - set(REFUSED)
    assert names(chat) == set(REFUSED_IN_CHAT) - set(REFUSED)
    assert names(messages) == set(REFUSED_IN_MESSAGES)


def test_the_cos_object_is_documented() -> None:
    documented = names(section("The `cos` object"))
    assert set(CosOptions.model_fields) | set(CosReport.model_fields) <= documented


def test_every_route_is_documented(live: Live) -> None:
    for path in live.http.get("/openapi.json").json()["paths"]:
        assert path.replace("{name}", "{id}") in TEXT


def test_the_limits_are_the_defaults() -> None:
    http = HttpConfig()
    shown = (http.max_n, http.max_logit_bias, http.max_stop, http.max_stop_chars, http.max_logprobs)
    assert shown == (128, 1024, 16, 256, 20)
    assert (http.max_prompts, http.max_prompt_chars, http.template_seconds) == (64, 1 << 20, 10)

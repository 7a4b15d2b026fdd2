"""Salts, and what usage tells of the prefix cache."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Live

PROMPT = "1 2 3 4 5 6 7 8 9 a b c d e f g h i"  # 18 tokens; 16 of them fill pages of 4


def cached(answer: dict[str, Any]) -> int:
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def test_usage_counts_what_was_found(live: Live) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "seed": 3, "cache_salt": "counted"}
    first = live.complete(**body)
    second = live.complete(**body)
    assert (cached(first), cached(second)) == (0, 16)
    assert first["choices"] == second["choices"]
    assert live.table.value("cos_prefix_cache_hit_tokens_total", model="m0") >= 16
    chunks = live.stream(**body, stream_options={"include_usage": True})
    assert cached(chunks[-1]) == 16


def test_several_choices_read_their_prompt_once(live: Live) -> None:
    body = {"prompt": [PROMPT, PROMPT + " j"], "max_tokens": 2, "n": 3, "cache_salt": "choices"}
    assert cached(live.complete(**body)) in (0, 16)  # the second prompt may find the first
    assert cached(live.complete(**body)) == 32


def test_other_salts_find_nothing(live: Live) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2}
    for salt in ("one", "two"):
        assert cached(live.complete(**body, cache_salt=salt)) == 0


@pytest.mark.parametrize("salt", ["", "a/b", "a\\b", "a@b", "\0", "x" * 129, 5])
def test_malformed_salts_are_refused(live: Live, salt: Any) -> None:
    response = live.post(cache_salt=salt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "cache_salt"

"""Streams of /v1/chat/completions, as raw bytes from a real socket."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Live
from tests.support.api import EOS


def contents(chunks: list[dict[str, Any]]) -> dict[int, str]:
    whole: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            whole[index] = whole.get(index, "") + choice["delta"]["content"]
    return whole


def test_chunks(live: Live) -> None:
    first, *chunks = live.stream_chat(max_tokens=20, ignore_eos=True)
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert len({chunk["id"] for chunk in chunks} | {first["id"]}) == 1
    for chunk in chunks:
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert chunk["object"] == "chat.completion.chunk"
        [choice] = chunk["choices"]
        assert set(choice["delta"]) == {"content"}
        assert choice["delta"]["content"]  # the last one too: its reason comes with its text
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]


@pytest.mark.parametrize("body", [{}, {"n": 3}, {"stop": "1 2"}])
def test_a_stream_says_what_a_body_says(live: Live, body: dict[str, Any]) -> None:
    body = {"seed": 11, "max_tokens": 20, **body}
    whole = live.chat(**body)
    chunks = live.stream_chat(**body)
    choices = whole["choices"]
    assert contents(chunks) == {c["index"]: c["message"]["content"] for c in choices}
    ends = {
        choice["index"]: (choice["finish_reason"], choice["stop_reason"])
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"]
    }
    assert ends == {c["index"]: (c["finish_reason"], c["stop_reason"]) for c in choices}


def test_every_choice_says_its_role_first_and_once(live: Live) -> None:
    chunks = live.stream_chat(n=3, max_tokens=6, ignore_eos=True)
    roles = [choice for chunk in chunks for choice in chunk["choices"] if "role" in choice["delta"]]
    assert [choice["index"] for choice in roles] == [0, 1, 2]
    assert chunks[:3] == [chunk for chunk in chunks if "role" in chunk["choices"][0]["delta"]]


def test_logprobs_of_a_stream_join_to_those_of_a_body(live: Live) -> None:
    body = {"temperature": 0, "max_tokens": 15, "logprobs": True, "top_logprobs": 2}
    whole = live.chat(ignore_eos=True, **body)["choices"][0]["logprobs"]["content"]
    chunks = live.stream_chat(ignore_eos=True, **body)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    joined = [entry for part in parts if part for entry in part["content"]]
    assert [entry["token"] for entry in joined] == [entry["token"] for entry in whole]
    assert [entry["logprob"] for entry in joined] == pytest.approx(
        [entry["logprob"] for entry in whole], abs=1e-5
    )


def test_usage_comes_last_and_only_when_asked_for(live: Live) -> None:
    options = {"include_usage": True}
    chunks = live.stream_chat(max_tokens=9, ignore_eos=True, stream_options=options)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    assert chunks[-1]["cos"]["strategy"] == "auto"


def test_continuous_usage_rises_with_every_chunk(live: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = live.stream_chat(max_tokens=20, ignore_eos=True, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["choices"]]
    assert counts == sorted(set(counts))
    assert (counts[0], counts[-1]) == (0, 20)


def test_a_reply_without_characters_still_ends(live: Live) -> None:
    role, end = live.stream_chat(logit_bias={str(EOS): 100}, max_tokens=5)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert end["choices"][0]["delta"] == {"content": ""}
    assert end["choices"][0]["finish_reason"] == "stop"


def test_early_errors_are_real_statuses(live: Live) -> None:
    assert live.post_chat(stream=True, messages=[]).status_code == 400
    assert live.post_chat(stream=True, model="gpt-4").status_code == 404


def test_a_client_that_leaves_a_stream_frees_the_engine(paced: Live) -> None:
    body = {"model": "table", "messages": [{"role": "user", "content": "1"}], "stream": True}
    with paced.http.stream("POST", "/v1/chat/completions", json=body | {"n": 2}) as response:
        next(response.iter_raw())
    paced.wait_idle()

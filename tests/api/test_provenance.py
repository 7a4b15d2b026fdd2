"""cos.provenance: where each token of a choice came from, beside the tokens it speaks of."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.api.conftest import Live

COS = {"strategy": "cos", "gamma": [3, 2], "provenance": True}
BODY: dict[str, Any] = {"seed": 5, "max_tokens": 30, "return_token_ids": True}


def check(choices: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """One entry for each token, adding up to the report of the whole request."""
    assert all(len(choice["provenance"]) == len(choice["token_ids"]) for choice in choices)
    entries = [entry for choice in choices for entry in choice["provenance"]]
    assert all(set(entry) == {"model", "outcome"} for entry in entries)
    outcomes = Counter(entry["outcome"] for entry in entries)
    assert (outcomes["recovered"], outcomes["drawn"]) == (report["recovered"], report["drawn"])
    assert 0 < outcomes["bonus"] <= report["bonus"]
    kept = [entry for entry in entries if entry["outcome"] in ("accepted", "bonus")]
    by_model = Counter(entry["model"] for entry in kept)
    assert [by_model["m0"], by_model["m1"]] == report["accepted"]
    assert {entry["model"] for entry in entries if entry["outcome"] == "recovered"} <= {"m0", "m1"}


@pytest.mark.parametrize("endpoint", ["complete", "chat"])
def test_a_whole_reply_tells_of_every_token(live: Live, endpoint: str) -> None:
    ask = getattr(live, endpoint)
    body = ask(n=2, ignore_eos=True, cos=COS, **BODY)
    assert body["cos"]["discarded"] == 0
    check(body["choices"], body["cos"])


@pytest.mark.parametrize("endpoint", ["stream", "stream_chat"])
def test_a_stream_tells_it_beside_the_tokens(live: Live, endpoint: str) -> None:
    options = {"stream_options": {"include_usage": True}, "ignore_eos": True}
    *chunks, last = getattr(live, endpoint)(n=2, cos=COS, **options, **BODY)
    choices = [chunk["choices"][0] for chunk in chunks if "token_ids" in chunk["choices"][0]]
    assert len(choices) > 10
    check(choices, last["cos"])


def test_a_stream_tells_of_tokens_whose_text_is_held_back(live: Live) -> None:
    """A stop string could begin in it."""
    body = BODY | {"return_token_ids": False, "ignore_eos": True}
    text = live.complete(**body)["choices"][0]["text"]
    stop = text[4:40] + " never"
    chunks = [chunk["choices"][0] for chunk in live.stream(cos=COS, stop=stop, **body)]
    silent = [choice for choice in chunks if not choice["text"]]
    assert len(silent) > 2
    assert all(choice["provenance"] for choice in silent)
    assert "".join(choice["text"] for choice in chunks) == text
    assert sum(len(choice["provenance"]) for choice in chunks) == 30


def test_tokens_after_the_end_of_the_text_are_not_told_of(live: Live) -> None:
    """A stop string may complete inside an accepted run; what follows it is discarded."""
    cos = {**COS, "gamma": [8, 8]}
    whole = live.complete(ignore_eos=True, cos=cos, **BODY)["choices"][0]
    discarded = 0
    for stop in whole["text"].split():
        body = live.complete(ignore_eos=True, cos=cos, stop=stop, **BODY)
        [choice] = body["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["provenance"] == whole["provenance"][: len(choice["token_ids"])]
        discarded += body["cos"]["discarded"]
    assert discarded > 0


@pytest.mark.parametrize("options", [{}, {"provenance": None}, {"provenance": False}])
def test_nothing_is_told_unless_asked_for(live: Live, options: dict[str, Any]) -> None:
    assert "provenance" not in live.complete(max_tokens=3, cos=options)["choices"][0]
    assert "provenance" not in live.chat(max_tokens=3, cos=options)["choices"][0]
    for chunk in [*live.stream(cos=options), *live.stream_chat(max_tokens=3, cos=options)]:
        assert "provenance" not in chunk["choices"][0]


def test_it_is_a_boolean(live: Live) -> None:
    for post in (live.post, live.post_chat):
        response = post(cos={"provenance": 1})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "cos.provenance"


def test_no_tokens_have_no_provenance(live: Live) -> None:
    body = live.complete(max_tokens=0, echo=True, cos=COS)
    assert body["choices"][0]["provenance"] == []


def test_the_document_declares_it(live: Live) -> None:
    schemas = live.http.get("/openapi.json").json()["components"]["schemas"]
    assert "provenance" in schemas["CosOptions"]["properties"]
    for choice in ("CompletionChoice", "ChatChoice", "ChunkChoice"):
        assert "provenance" in schemas[choice]["properties"]
    outcomes = schemas["TokenProvenance"]["properties"]["outcome"]["enum"]
    assert outcomes == ["accepted", "bonus", "recovered", "drawn", "forced"]

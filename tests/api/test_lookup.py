"""decoding.prompt_lookup and cos.prompt_lookup: who gets it, and what replies tell of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Live

LOOKUP = {"prompt_lookup": {"min_ngram": 1, "max_tokens": 4}}
PROMPT = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"
# One token is far ahead, so the text repeats it.
BODY: dict[str, Any] = {
    "prompt": PROMPT,
    "max_tokens": 20,
    "ignore_eos": True,
    "logit_bias": {"7": 10},
}


@pytest.mark.parametrize(
    ("asked", "is_on"),
    [
        ({}, True),
        ({"prompt_lookup": False}, False),
        ({"strategy": "cos", "gamma": 2}, True),
        ({"strategy": "standard"}, False),
        ({"strategy": "standard", "prompt_lookup": True}, True),
        ({"strategy": "single"}, False),
        ({"strategy": "mixture"}, False),
    ],
)
def test_who_gets_it(start: Any, asked: dict[str, Any], is_on: bool) -> None:
    live: Live = start(decoding=LOOKUP)
    report = live.complete(cos=asked, **BODY)["cos"]
    if not is_on:
        assert report["prompt_lookup"] is None
        return
    found = report["prompt_lookup"]
    assert 0 < found["accepted"] <= found["proposed"]
    made = sum(report["accepted"]) + found["accepted"] + report["recovered"] + report["drawn"]
    assert made - report["discarded"] == 20
    assert live.table.value("cos_spec_accepted_tokens_total", proposer="prompt_lookup") > 0
    assert live.table.value("cos_prompt_lookups_total", outcome="proposed") > 0


def test_provenance_and_seeded_text(start: Any) -> None:
    live: Live = start(decoding=LOOKUP)
    texts = []
    for wanted in (True, False):
        options = {"strategy": "cos", "prompt_lookup": wanted, "provenance": True}
        choice = live.complete(cos=options, seed=5, **BODY)["choices"][0]
        texts.append(choice["text"])
        models = {e["model"] for e in choice["provenance"] if e["outcome"] == "accepted"}
        assert ("prompt_lookup" in models) is wanted
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("decoding", "asked", "reason"),
    [
        ({}, {}, "is not configured"),
        (LOOKUP, {"strategy": "mixture"}, "does not go with strategy mixture"),
    ],
)
def test_what_cannot_be_had_is_refused(
    start: Any, decoding: dict[str, Any], asked: dict[str, Any], reason: str
) -> None:
    live: Live = start(decoding=decoding)
    response = live.post(cos={"prompt_lookup": True, **asked})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "cos.prompt_lookup"
    assert reason in response.json()["error"]["message"]

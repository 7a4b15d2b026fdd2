"""Token ids beside and instead of text, and replies that carry the client's own id."""

from __future__ import annotations

from typing import Any

from tests.api.conftest import Live
from tests.support.api import EOS
from tests.support.table_lm import DigitDecoder

BODY: dict[str, Any] = {"seed": 5, "max_tokens": 12, "return_token_ids": True}


def text_of(token_ids: list[int]) -> str:
    return DigitDecoder().decode([token_id for token_id in token_ids if token_id != EOS])


def test_ids_of_a_completion(live: Live) -> None:
    body = live.complete(prompt=["1 2", "3"], n=2, **BODY)
    choices = body["choices"]
    assert [c["prompt_token_ids"] for c in choices] == [[1, 2], [1, 2], [3], [3]]
    assert [c["text"] for c in choices] == [text_of(c["token_ids"]) for c in choices]
    assert sum(len(c["token_ids"]) for c in choices) == body["usage"]["completion_tokens"]


def test_ids_of_a_completion_stream(live: Live) -> None:
    whole = live.complete(n=2, stop="zzz", **BODY)
    chunks = [chunk["choices"][0] for chunk in live.stream(n=2, stop="zzz", **BODY)]
    for choice in whole["choices"]:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert [chunk.get("prompt_token_ids") for chunk in mine] == [[1, 2]] + [None] * (
            len(mine) - 1
        )
        assert [i for chunk in mine for i in chunk["token_ids"]] == choice["token_ids"]
        # Text may lag behind: a stop string could begin in it.
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]


def test_ids_of_a_chat(live: Live) -> None:
    whole = live.chat(**BODY)
    [choice] = whole["choices"]
    assert whole["prompt_token_ids"] == [30, 1, 2, 10]
    assert choice["message"]["content"] == text_of(choice["token_ids"])
    role, *chunks = live.stream_chat(**BODY)
    assert role["prompt_token_ids"] == [30, 1, 2, 10]
    assert not any("prompt_token_ids" in chunk for chunk in chunks)
    ids = [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]]
    assert ids == choice["token_ids"]


def test_ids_are_left_out_unless_asked_for(live: Live) -> None:
    body = live.complete(return_token_ids=False)
    assert not {"prompt_token_ids", "token_ids"} & set(body["choices"][0])
    assert "token_ids" not in live.chat(max_tokens=3)["choices"][0]


def test_logprobs_may_name_tokens_by_id(live: Live) -> None:
    options = {"max_tokens": 4, "seed": 1, "ignore_eos": True, "return_tokens_as_token_ids": True}
    body = live.complete(logprobs=2, return_token_ids=True, **options)["choices"][0]
    names = [f"token_id:{token_id}" for token_id in body["token_ids"]]
    assert body["logprobs"]["tokens"] == names
    tops = body["logprobs"]["top_logprobs"]
    assert all(name in top for name, top in zip(names, tops, strict=True))
    assert body["logprobs"]["text_offset"][0] == 0
    chat = live.chat(logprobs=True, top_logprobs=1, return_token_ids=True, **options)["choices"][0]
    found = [entry["token"] for entry in chat["logprobs"]["content"]]
    assert found == [f"token_id:{token_id}" for token_id in chat["token_ids"]]
    top = [entry["top_logprobs"][0]["token"] for entry in chat["logprobs"]["content"]]
    assert all(name.startswith("token_id:") for name in top)


def test_a_request_id_ends_the_id_and_may_repeat(paced: Live) -> None:
    body = {"model": "table", "prompt": "1", "request_id": "mine", "stream": True}
    with paced.http.stream("POST", "/v1/completions", json=body | {"max_tokens": 60}) as running:
        assert running.status_code == 200
        assert paced.complete(request_id="mine", max_tokens=2)["id"] == "cmpl-mine"
    assert paced.chat(request_id="mine", max_tokens=2)["id"] == "chatcmpl-mine"

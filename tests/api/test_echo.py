"""echo, prompt_logprobs, truncate_prompt_tokens and bad_words over HTTP."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from server.api.reply import Piece, PromptScores
from server.core.combination import Combination
from server.core.output import TokenLogprob
from server.core.sampling_params import SamplingParams
from tests.api.conftest import Live
from tests.support.api import EOS, MAX_LENGTH, VOCAB_SIZE
from tests.support.exact import target
from tests.support.table_lm import TableLM

PROMPT = [5, 7, 11, 3] * 10
LMS = [TableLM(k, VOCAB_SIZE) for k in range(2)]
STANDARD = {"strategy": "standard"}


def expected(ids: list[int]) -> list[float]:
    """Log-probabilities of all tokens but the first, by the tables alone."""
    half = Combination.weighted([0.5, 0.5])
    rows = [target(LMS, half, SamplingParams(), ids[:i], []) for i in range(1, len(ids))]
    return [math.log(row[token]) for row, token in zip(rows, ids[1:], strict=True)]


@pytest.mark.parametrize("cos", [{}, STANDARD])
def test_echoed_log_probabilities_are_of_the_combination(live: Live, cos: dict[str, Any]) -> None:
    body = live.complete(
        prompt=PROMPT, echo=True, logprobs=2, max_tokens=6, ignore_eos=True, cos=cos,
        return_token_ids=True, temperature=0.3,
    )  # fmt: skip
    [choice] = body["choices"]
    ids = PROMPT + choice["token_ids"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected(ids), abs=1e-4)
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == [
        len("".join(logprobs["tokens"][:i])) for i in range(len(ids))
    ]
    for token, logprob, top in zip(
        logprobs["tokens"][1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:],
        strict=True,
    ):  # fmt: skip
        assert top[token] == logprob <= max(top.values())
        assert 2 <= len(top) <= 3
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (40, 6)
    assert "prompt_logprobs" not in choice


def test_the_prompt_alone_is_an_answer(live: Live) -> None:
    prompts = [PROMPT, [4], [1, 2]]
    body = live.complete(prompt=prompts, n=2, echo=True, max_tokens=0, logprobs=0)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    for choice in body["choices"]:
        ids = prompts[choice["index"] // 2]
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected(ids), abs=1e-4)
        assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert body["usage"]["completion_tokens"] == 0
    plain = live.complete(prompt="1 2", echo=True, max_tokens=0)
    assert plain["choices"][0]["text"] == "1 2"
    assert plain["choices"][0]["logprobs"] is None


def test_a_text_is_echoed_as_it_was_given(live: Live) -> None:
    for prompt, echoed in (("1   2", "1   2"), ([1, 2], "1 2 ")):
        [choice] = live.complete(prompt=prompt, echo=True, max_tokens=3, seed=1)["choices"]
        alone = live.complete(prompt=prompt, max_tokens=3, seed=1)["choices"][0]["text"]
        assert choice["text"] == echoed + alone


def test_a_stream_begins_with_the_prompt(live: Live) -> None:
    options: dict[str, Any] = {"prompt": [PROMPT, [1, 2]], "echo": True, "max_tokens": 5, "seed": 3}
    whole = live.complete(**options, logprobs=1, stop=["zzz"])
    chunks = live.stream(**options, logprobs=1, stop=["zzz"])
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        for key, values in choice["logprobs"].items():
            assert [v for chunk in mine for v in chunk["logprobs"][key]] == values
        assert mine[0]["logprobs"]["token_logprobs"][0] is None


def test_prompt_logprobs_by_name(live: Live) -> None:
    body = live.complete(prompt=PROMPT, prompt_logprobs=3, max_tokens=1)
    scores = body["choices"][0]["prompt_logprobs"]
    assert scores[0] is None
    assert len(scores) == len(PROMPT)
    for token, logprob, entry in zip(PROMPT[1:], expected(PROMPT), scores[1:], strict=True):
        assert next(iter(entry)) == str(token)
        assert entry[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert len(entry) == 3 + (entry[str(token)]["rank"] > 3)
        best = sorted(entry.values(), key=lambda score: -score["logprob"])
        assert [score["rank"] for score in best[:3]] == [1, 2, 3]
    assert body["choices"][0]["logprobs"] is None
    chat = live.chat(prompt_logprobs=0, max_tokens=1, return_token_ids=True)
    assert [s and int(next(iter(s))) for s in chat["prompt_logprobs"]] == [
        None,
        *chat["prompt_token_ids"][1:],
    ]


def test_a_prompt_is_scored_once_for_all_its_choices(live: Live) -> None:
    def num_fed() -> float:
        name = "cos_model_forward_tokens_total"
        return live.table.value(name, model="m0", phase="prefill")

    prompts, before = [PROMPT, PROMPT[::-1]], num_fed()
    options: dict[str, Any] = {"prompt": prompts, "prompt_logprobs": 1, "max_tokens": 1}
    body = live.complete(**options, n=8, echo=True, logprobs=0, cos=STANDARD)
    num_scored = num_fed() - before
    # Of the other choices one reads it, and the rest find all but its last, incomplete page.
    assert 2 * 2 * len(PROMPT) <= num_scored <= 2 * (2 * len(PROMPT) + 6 * 16)
    assert [choice["index"] for choice in body["choices"]] == list(range(16))
    for choice in body["choices"]:
        ids = prompts[choice["index"] // 8]
        scored = choice["prompt_logprobs"]
        assert scored == body["choices"][choice["index"] // 8 * 8]["prompt_logprobs"]
        found = [entry[str(token)] for token, entry in zip(ids[1:], scored[1:], strict=True)]
        assert [entry["logprob"] for entry in found] == pytest.approx(expected(ids), abs=1e-4)
        echoed = choice["logprobs"]["token_logprobs"][1 : len(ids)]
        assert echoed == pytest.approx(expected(ids), abs=1e-4)


def test_choices_of_a_stream_share_the_scores_of_their_prompt(live: Live) -> None:
    name = "cos_model_forward_tokens_total"
    before = live.table.value(name, model="m0", phase="prefill")
    options: dict[str, Any] = {"prompt": [PROMPT, PROMPT[::-1]], "n": 8, "max_tokens": 2}
    chunks = live.stream(**options, echo=True, logprobs=1, cos=STANDARD)
    num_fed = live.table.value(name, model="m0", phase="prefill") - before
    assert num_fed <= 2 * (2 * len(PROMPT) + 6 * 16)
    first: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        first.setdefault(choice["index"], choice)
    assert set(first) == set(range(16))
    for index, choice in first.items():
        ids = options["prompt"][index // 8]
        echoed = choice["logprobs"]["token_logprobs"][1 : len(ids)]
        assert echoed == pytest.approx(expected(ids), abs=1e-4)


def piece(index: int, scores: int = 0) -> Piece:
    entries = tuple(TokenLogprob(token_id, -1.0) for token_id in range(scores))
    return Piece(index, "a", (1,), None, None, None, None, entries)


def test_pieces_wait_for_the_scores_of_their_prompt() -> None:
    shared = PromptScores(num_prompts=2, num_choices=2)
    assert shared.share(piece(1)) == []
    assert shared.share(piece(3)) == []
    assert shared.share(piece(1)) == []
    assert shared.share(piece(0, 5)) == [piece(0, 5), piece(1, 5), piece(1)]
    assert shared.share(piece(1)) == [piece(1)]
    assert shared.share(piece(2, 4)) == [piece(2, 4), piece(3, 4)]
    assert shared.are_told
    assert shared.share(piece(2)) == [piece(2)]


def test_scores_of_prompts_are_bounded(start: Callable[..., Live]) -> None:
    live = start(http={"max_prompt_scores": 480})
    scored: dict[str, Any] = {"prompt": [PROMPT, PROMPT], "n": 2, "max_tokens": 1}
    assert live.post(**scored, prompt_logprobs=2).status_code == 200
    assert live.post(**scored, echo=True, logprobs=2, stream=True).status_code == 200
    assert live.post_chat(n=64, prompt_logprobs=2, max_tokens=1).status_code == 200
    for fields, param in (
        ({"prompt_logprobs": 3}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 3}, "logprobs"),
        ({"echo": True, "logprobs": 3, "stream": True}, "logprobs"),
        ({"echo": True, "logprobs": 0, "prompt_logprobs": 2}, "prompt_logprobs"),
        ({"echo": True, "max_tokens": 0, "n": 7}, "logprobs"),
    ):
        response = live.post(**{**scored, **fields})
        assert response.status_code == 400, fields
        assert response.json()["error"]["param"] == param
        assert "limit 480" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs", "limit 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "cannot be streamed"),
        ({"max_tokens": 0}, "max_tokens", "at least 1 unless echo is true"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or at least 1"),
        ({"truncate_prompt_tokens": 257}, "truncate_prompt_tokens", "limit 256"),
        ({"bad_words": ["a"] * 129}, "bad_words", "129 texts"),
        ({"bad_words": ["a" * 257]}, "bad_words", "257 characters"),
        ({"bad_words": [" "]}, "bad_words", "empty"),
    ],
)
def test_refusals(live: Live, fields: dict[str, Any], param: str, words: str) -> None:
    response = live.post(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert words in response.json()["error"]["message"]


def test_prompts_are_cut_from_the_left(live: Live) -> None:
    options: dict[str, Any] = {"max_tokens": 3, "echo": True, "return_token_ids": True}
    body = live.complete(prompt="1 2 3 4 5", truncate_prompt_tokens=2, **options)
    assert body["choices"][0]["prompt_token_ids"] == [4, 5]
    assert body["choices"][0]["text"].startswith("4 5 ")
    assert body["usage"]["prompt_tokens"] == 2
    longer = [1] * (2 * MAX_LENGTH)
    body = live.complete(prompt=longer, truncate_prompt_tokens=-1, ignore_eos=True, **options)
    assert body["usage"]["prompt_tokens"] == MAX_LENGTH - 3
    assert body["usage"]["completion_tokens"] == 3
    assert live.chat(truncate_prompt_tokens=2, max_tokens=1)["usage"]["prompt_tokens"] == 2


def test_bad_words_are_never_completed(live: Live) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 60,
        "seed": 5,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    fields |= {"allowed_token_ids": [1, 2, 3, EOS]}
    bad = ["1 2", "33", "2 1 3"]
    for cos in ({}, STANDARD):
        for temperature in (0, 1):
            body = live.complete(bad_words=bad, cos=cos, temperature=temperature, **fields)
            text = body["choices"][0]["text"]
            assert not any(word in text for word in ("1 2", "3 3", "2 1 3"))
    free = live.complete(**fields)["choices"][0]["text"]
    assert any(word in free for word in ("1 2", "3 3", "2 1 3"))

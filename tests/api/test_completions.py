"""Bodies of /v1/completions that are not streams."""

from __future__ import annotations

from typing import Any

import pytest

from server.decoding.rng import derive_seed
from tests.api.conftest import Live
from tests.support.api import EOS, MAX_LENGTH, VOCAB_SIZE, usage


def test_shape_of_a_body(live: Live) -> None:
    body = live.complete(max_tokens=5, ignore_eos=True)
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "table"
    assert body["usage"] == usage(2, 5)
    [choice] = body["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert choice["stop_reason"] is None


def test_max_tokens_is_16_by_default(live: Live) -> None:
    assert live.complete(ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_max_tokens_is_cut_to_the_context(live: Live) -> None:
    body = live.complete(prompt=[1] * (MAX_LENGTH - 3), max_tokens=100, ignore_eos=True)
    assert body["usage"]["completion_tokens"] == 3
    assert body["choices"][0]["finish_reason"] == "length"


def test_every_form_of_prompt_gives_the_same_text(live: Live) -> None:
    forms = ["1 2", ["1 2"], [1, 2], [[1, 2]]]
    bodies = [live.complete(prompt=form, seed=3, max_tokens=8) for form in forms]
    assert len({body["choices"][0]["text"] for body in bodies}) == 1
    assert all(body["usage"]["prompt_tokens"] == 2 for body in bodies)


def test_choices_are_prompt_major_and_prompts_count_once(live: Live) -> None:
    body = live.complete(prompt=["1 2", "3"], n=3, seed=5, max_tokens=6, ignore_eos=True)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert body["usage"] == usage(3, 36)
    alone = live.complete(prompt="3", n=3, seed=5, max_tokens=6, ignore_eos=True)
    assert [c["text"] for c in body["choices"][3:]] == [c["text"] for c in alone["choices"]]


def test_seeded_choices_differ_and_repeat(live: Live) -> None:
    first = live.complete(n=4, seed=7, max_tokens=12, ignore_eos=True)
    texts = [choice["text"] for choice in first["choices"]]
    again = live.complete(n=4, seed=7, max_tokens=12, ignore_eos=True)
    assert texts == [choice["text"] for choice in again["choices"]]
    assert len(set(texts)) == 4
    third = live.complete(seed=derive_seed(7, 2), max_tokens=12, ignore_eos=True)
    assert third["choices"][0]["text"] == texts[2]


@pytest.mark.parametrize("seed", [None, -1])
def test_unseeded_requests_differ(live: Live, seed: int | None) -> None:
    """Clients of other servers say -1."""
    asked = {"max_tokens": 20, "ignore_eos": True, "seed": seed}
    texts = {live.complete(**asked)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


def test_greedy_choices_are_equal(live: Live) -> None:
    body = live.complete(n=3, temperature=0, max_tokens=10)
    assert len({choice["text"] for choice in body["choices"]}) == 1


def test_stop_strings_and_stop_tokens(live: Live) -> None:
    whole = live.complete(temperature=0, max_tokens=12, ignore_eos=True)["choices"][0]["text"]
    stop = whole[4:7]
    cut = live.complete(temperature=0, max_tokens=12, ignore_eos=True, stop=["zzz", stop])
    [choice] = cut["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    kept = live.complete(
        temperature=0, max_tokens=12, ignore_eos=True, stop=stop, include_stop_str_in_output=True
    )
    assert kept["choices"][0]["text"].endswith(stop)
    token = live.complete(temperature=0, max_tokens=1, ignore_eos=True, logprobs=0)
    token_id = int(token["choices"][0]["logprobs"]["tokens"][0].strip(), 36)
    ended = live.complete(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[token_id])
    assert ended["choices"][0]["stop_reason"] == token_id
    assert ended["usage"]["completion_tokens"] == 1


def test_end_of_text_and_min_tokens(live: Live) -> None:
    bias = {str(EOS): 100}
    ended = live.complete(logit_bias=bias, max_tokens=9)
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["choices"][0]["text"] == ""
    assert ended["usage"]["completion_tokens"] == 1
    held = live.complete(logit_bias=bias, max_tokens=9, min_tokens=4)
    assert held["usage"]["completion_tokens"] >= 4


def test_allowed_token_ids(live: Live) -> None:
    body = live.complete(allowed_token_ids=[3, 4], max_tokens=20)
    assert set(body["choices"][0]["text"].split()) <= {"3", "4"}


@pytest.mark.parametrize(
    "body",
    [
        {"allowed_token_ids": [EOS]},
        {"allowed_token_ids": [EOS], "min_tokens": 2, "ignore_eos": True},
        {"allowed_token_ids": [EOS, 3], "min_tokens": 2},
        {"stop_token_ids": list(range(VOCAB_SIZE))},
    ],
)
def test_few_tokens_are_enough(live: Live, body: dict[str, Any]) -> None:
    assert live.complete(**body)["usage"]["completion_tokens"] >= body.get("min_tokens", 1)


@pytest.mark.parametrize("strategy", ["standard", "cos", "speculative"])
def test_logprobs(live: Live, strategy: str) -> None:
    options = {"cos": {"strategy": strategy}, "ignore_eos": True}
    body = live.complete(temperature=0, logprobs=2, max_tokens=6, **options)
    logprobs = body["choices"][0]["logprobs"]
    text = body["choices"][0]["text"]
    assert "".join(logprobs["tokens"]) == text
    assert logprobs["text_offset"] == [
        sum(map(len, logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))
    ]
    for value, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert value == max(top.values())  # greedy: exactly, as evaluation harnesses compare
        assert len(top) == 2
    reference = live.complete(
        temperature=0, logprobs=2, max_tokens=6, ignore_eos=True, cos={"strategy": "standard"}
    )
    expected = reference["choices"][0]["logprobs"]["token_logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx(expected, abs=1e-5)


def test_logprobs_0_reports_the_token_alone(live: Live) -> None:
    logprobs = live.complete(logprobs=0, max_tokens=3, ignore_eos=True)["choices"][0]["logprobs"]
    assert [list(top) for top in logprobs["top_logprobs"]] == [[t] for t in logprobs["tokens"]]


def test_impossible_alternatives_have_a_finite_logprob(live: Live) -> None:
    mask = {"method": "contrastive", "mu": 0.5, "plausibility": 0.9}
    body = live.complete(logprobs=20, max_tokens=3, ignore_eos=True, cos={"combination": mask})
    values = [v for top in body["choices"][0]["logprobs"]["top_logprobs"] for v in top.values()]
    assert min(values) == -9999.0


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"strategy": "auto", "gamma": [2, 1], "kappa": None, "strategies": {"cos": 12}}),
        ({"strategy": "cos", "gamma": "auto"}, {"strategy": "cos", "gamma": [2, 1]}),
        ({"strategy": "cos", "gamma": 4}, {"gamma": [4, 1], "strategies": {"cos": 12}}),
        ({"strategy": "standard"}, {"strategy": "standard"}),
        ({"strategy": "single"}, {"combination": {"method": "weighted", "weights": [0.0, 1.0]}}),
        ({"gamma": 7}, {"gamma": [7, 1]}),
        ({"gamma": [2, 3]}, {"gamma": [2, 3]}),
        (
            {"strategy": "mixture", "kappa": 1},
            {"strategy": "mixture", "kappa": 1, "shared_coins": True},
        ),
        (
            {"combination": {"method": "contrastive", "mu": 0.25}},
            {"combination": {"method": "contrastive", "weights": [-0.25, 1.0]}},
        ),
        (
            {"combination": {"method": "linear", "weights": [0.5, 1]}},
            {"combination": {"method": "linear", "weights": [0.5, 1.0]}},
        ),
    ],
)
def test_effective_decoding_is_reported(
    live: Live, asked: dict[str, Any], expected: dict[str, Any]
) -> None:
    report = live.complete(max_tokens=12, ignore_eos=True, cos=asked)["cos"]
    assert {key: report[key] for key in expected} == expected


def test_figures_of_the_report_add_up(live: Live) -> None:
    report = live.complete(max_tokens=40, ignore_eos=True)["cos"]
    made = sum(report["accepted"]) + report["recovered"] + report["drawn"]
    assert made - report["discarded"] == 40
    assert all(a <= p for a, p in zip(report["accepted"], report["proposed"], strict=True))
    assert all(forwards > 0 for forwards in report["forwards"])


@pytest.mark.parametrize(("body", "shared"), [({}, True), ({"n": 2}, False), ({"seed": 1}, False)])
def test_coins_are_shared_by_default_where_nobody_can_tell(
    live: Live, body: dict[str, Any], shared: bool
) -> None:
    options = {"strategy": "mixture"}
    assert live.complete(cos=options, **body)["cos"]["shared_coins"] is shared
    insisting = {**options, "shared_coins": True}
    assert live.complete(cos=insisting, **body)["cos"]["shared_coins"] is True


def test_a_configured_mixture_falls_back_where_it_cannot_serve(start) -> None:
    live = start(decoding={"strategy": "mixture"})
    assert live.complete()["cos"]["strategy"] == "mixture"
    for body in ({"temperature": 0}, {"logprobs": 1}):
        assert live.complete(**body)["cos"]["strategy"] == "cos"


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-4, "logit_bias": {"1": 100}},
        {"top_p": 1e-300},
        {"top_k": 2**70},
        {"min_p": 1},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100, "presence_penalty": 2, "frequency_penalty": -2},
        {"logit_bias": {str(i): -100 for i in range(VOCAB_SIZE)}},
        {"max_tokens": 2**70, "stop": "1"},
        {"seed": -(2**63), "n": 2},
        {"cos": {"combination": {"method": "linear", "weights": [100, -100]}}},
        {"cos": {"combination": {"method": "weighted", "weights": [1e-300, 1]}}},
        {"cos": {"strategy": "mixture", "kappa": 0}, "seed": -5},
    ],
)
def test_extremes_are_served(live: Live, body: dict[str, Any]) -> None:
    assert live.complete(**body)["usage"]["completion_tokens"] > 0


def test_unknown_fields_are_ignored(live: Live) -> None:
    assert live.complete(user="me", no_such_field=[1], best_of=1, echo=False, suffix=None)


def test_the_whole_vocabulary_may_be_prompted(live: Live) -> None:
    assert live.complete(prompt=list(range(VOCAB_SIZE)), max_tokens=1)

"""Where each token came from: told token for token, agreeing with the counts, and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from server.core.combination import Combination
from server.core.output import TokenDelta
from server.core.provenance import Provenance
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from tests.support.engines import generated, make_decoding, make_engine, run
from tests.support.table_lm import TableLM

WEIGHTED = Combination.weighted([0.3, 0.4, 0.3])
LMS = [TableLM(seed=70 + k, vocab_size=20) for k in range(3)]
EOS = frozenset({3})
DECODINGS = {
    "standard": make_decoding("standard", WEIGHTED),
    "speculative": make_decoding("speculative", WEIGHTED, gamma=4),
    "cos": make_decoding("cos", WEIGHTED, gamma=(3, 2, 2)),
    "mixture": make_decoding("mixture", WEIGHTED, gamma=4, kappa=2),
}


def decode(
    decoding: DecodingParams, num_pages: int = 4096, **params: Any
) -> list[tuple[Sequence, list[TokenDelta]]]:
    sequences = [
        Sequence.start(
            f"s{i}", [1, i], SamplingParams(**{"max_tokens": 24, "seed": i, **params}), decoding
        )
        for i in range(20)
    ]
    deltas = run(make_engine(LMS, eos=EOS, num_pages=num_pages), sequences)
    return [(sequence, deltas[sequence.id]) for sequence in sequences]


def told(deltas: list[TokenDelta]) -> list[Provenance]:
    return [entry for delta in deltas for entry in delta.provenance]


@pytest.mark.parametrize("name", DECODINGS)
@pytest.mark.parametrize("is_seeded", [False, True])
@pytest.mark.parametrize("num_pages", [4096, 24])
def test_every_delta_tells_of_its_tokens_and_the_counts_agree(
    name: str, is_seeded: bool, num_pages: int
) -> None:
    """Where no text is cut off; also where memory is short, so that sequences start over."""
    preempted = 0
    asked = {"is_seeded": is_seeded, "provenance": True, "ignore_eos": True, "max_tokens": 25}
    for sequence, deltas in decode(DECODINGS[name], num_pages, **asked):
        assert all(len(delta.provenance) == len(delta.token_ids) for delta in deltas)
        stats = sequence.stats
        assert stats.num_discarded == 0
        outcomes = Counter(entry.outcome for entry in told(deltas))
        assert (outcomes["recovered"], outcomes["drawn"]) == (stats.num_recovered, stats.num_drawn)
        assert outcomes["bonus"] <= stats.num_bonus
        by_model = Counter(e.model for e in told(deltas) if e.outcome in ("accepted", "bonus"))
        assert [by_model[model] for model in range(3)] == stats.accepted
        assert all((e.model is None) == (e.outcome == "drawn") for e in told(deltas))
        preempted += stats.num_preemptions
    assert (preempted > 0) == (num_pages == 24)


@pytest.mark.parametrize("name", ["speculative", "cos"])
def test_an_accepted_token_is_its_models_own_choice_and_a_recovered_one_is_not(name: str) -> None:
    """Greedy models propose what they think best."""
    seen = set()
    for sequence, deltas in decode(DECODINGS[name], temperature=0.0, provenance=True):
        tokens = [1, sequence.token_ids[1], *generated(deltas)]
        for position, entry in enumerate(told(deltas), start=2):
            if entry.model is not None:
                best = int(LMS[entry.model].logits(tokens[:position]).argmax())
                assert (tokens[position] == best) == (entry.outcome != "recovered")
            seen.add((entry.model, entry.outcome))
    proposers = {0, 1, 2} if name == "cos" else {0}
    assert {model for model, outcome in seen if outcome == "accepted"} >= {0}
    assert {model for model, outcome in seen if model is not None} == proposers
    assert any(outcome == "bonus" for _, outcome in seen) == (name == "cos")


@pytest.mark.parametrize("name", DECODINGS)
def test_asking_changes_no_text_and_not_asking_keeps_nothing(name: str) -> None:
    asked, plain = (decode(DECODINGS[name], provenance=wanted) for wanted in (True, False))
    assert [generated(deltas) for _, deltas in asked] == [generated(deltas) for _, deltas in plain]
    assert any(sequence.stats.num_discarded for sequence, _ in asked) == (name != "standard")
    for sequence, deltas in asked:
        assert len(told(deltas)) == len(generated(deltas))
        assert sequence.provenance == []  # what was told is not kept
    for sequence, deltas in plain:
        assert told(deltas) == []
        assert sequence.provenance is None


def test_one_model_alone_and_standard_decoding_draw() -> None:
    single = replace(DECODINGS["standard"], strategy="single", combination=Combination.only(3, 2))
    for decoding in (single, DECODINGS["standard"]):
        for _, deltas in decode(decoding, provenance=True):
            assert set(told(deltas)) == {Provenance(None, "drawn")}

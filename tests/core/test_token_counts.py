"""Counts that follow a text, against those of a fresh look at it."""

from __future__ import annotations

import random
from collections import Counter

from server.core.combination import Combination
from server.core.proposal import Proposal
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.token_counts import TokenCounts

DECODING = DecodingParams("cos", Combination.only(1, 0), (1,))


def expected(sequence: Sequence, position: int) -> dict[int, int]:
    generated = Counter(sequence.token_ids[sequence.num_prompt : position])
    return {token_id: generated[token_id] for token_id in sequence.token_ids[:position]}


def found(sequence: Sequence, position: int) -> dict[int, int]:
    tokens, counts = sequence.counts_before(position)
    assert len(set(tokens.tolist())) == len(tokens)
    return dict(zip(tokens.tolist(), counts.tolist(), strict=True))


def test_counts_follow_a_text_that_is_proposed_rejected_and_drawn() -> None:
    chance = random.Random(0)
    prompt = [chance.randrange(90) for _ in range(70)]
    sequence = Sequence.start("s", prompt, SamplingParams(max_tokens=999), DECODING)
    for _ in range(300):
        for _ in range(chance.randrange(4)):
            sequence.propose(chance.randrange(200), Proposal(0))
        positions = range(sequence.num_verified, len(sequence) + 1)
        for position in chance.sample(positions, len(positions)):
            assert found(sequence, position) == expected(sequence, position)
        accepted = chance.randint(0, sequence.num_pending)
        sequence.accept(accepted)
        if sequence.num_pending:
            sequence.recover(chance.randrange(200))
        else:
            sequence.draw(chance.randrange(200))


def test_positions_that_were_decided_before_are_counted_too() -> None:
    sequence = Sequence.start("s", [5, 5, 6], SamplingParams(max_tokens=99), DECODING)
    for token_id in (5, 7, 7):
        sequence.draw(token_id)
    assert found(sequence, 6) == {5: 1, 6: 0, 7: 2}
    assert found(sequence, 5) == {5: 1, 6: 0, 7: 1}
    assert found(sequence, 2) == {5: 0}
    assert found(sequence, 6) == {5: 1, 6: 0, 7: 2}


def test_nothing_is_before_the_first_token() -> None:
    tokens, counts = TokenCounts().before([1, 2], 2, 2, 0)
    assert len(tokens) == len(counts) == 0

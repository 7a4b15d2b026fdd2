from __future__ import annotations

import random

import pytest

from server.core.combination import Combination
from server.core.proposal import Proposal
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence, Status
from server.core.unread import unread

DECODING = DecodingParams("cos", Combination.weighted([0.5, 0.5]), (3, 2))


def make_sequence(prompt: int = 4, verified: int = 0, pending: int = 0) -> Sequence:
    params = SamplingParams(max_tokens=50)
    sequence = Sequence.start("s", list(range(prompt)), params, DECODING)
    for token in range(verified):
        sequence.draw(100 + token)
    for token in range(pending):
        sequence.propose(200 + token, Proposal(token % 2))
    return sequence


def test_zones() -> None:
    sequence = make_sequence(prompt=4, verified=2, pending=3)
    assert (sequence.num_prompt, sequence.num_verified, len(sequence)) == (4, 6, 9)
    assert (sequence.num_generated, sequence.num_pending) == (2, 3)
    sequence.accept(2)
    assert (sequence.num_verified, sequence.tail) == (8, [Proposal(0)])
    assert sequence.stats.accepted == [1, 1]


def test_recover_replaces_the_first_pending_token_and_rolls_back() -> None:
    sequence = make_sequence(verified=1, pending=3)
    sequence.num_seen = [8, 4]
    sequence.resume_at = [8, 0]
    sequence.accept(1)
    sequence.recover(7)
    assert sequence.token_ids == [0, 1, 2, 3, 100, 200, 7]
    assert (sequence.num_seen, sequence.resume_at) == ([6, 4], [6, 0])
    sequence.check()


def test_what_its_proposer_did_not_have_was_never_proposed() -> None:
    """Nor was what others proposed behind it; known once the tail is read."""
    sequence = make_sequence(verified=1)
    for row, proposal in enumerate((Proposal(0), Proposal(0), Proposal(1, is_bonus=True))):
        sequence.propose(unread(row), proposal)
    sequence.num_seen = [7, 8]
    sequence.resume_at = [0, 8]
    sequence.read([7, -1, 9])
    assert (sequence.token_ids[5:], sequence.tail) == ([7], [Proposal(0)])
    assert (sequence.stats.proposed, sequence.stats.num_bonus) == ([1, 0], 0)
    assert (sequence.num_seen, sequence.resume_at) == ([6, 6], [0, 6])
    was_closed = sequence.is_closed  # nobody proposes there
    sequence.recover(3)
    # Other tokens are before it now.
    assert (was_closed, sequence.is_closed) == (True, False)
    sequence.check()


def test_provenance_is_handed_over_once_and_only_where_asked_for() -> None:
    params = SamplingParams(max_tokens=50, provenance=True)
    sequence = Sequence.start("s", [1], params, DECODING)
    sequence.draw(2)
    for token, is_bonus in enumerate((False, True, False, False)):
        sequence.propose(token, Proposal(token % 2, is_bonus=is_bonus))
    sequence.accept(2)
    sequence.recover(9)
    sequence.check()
    found = [(each.model, each.outcome) for each in sequence.take_provenance()]
    assert found == [(None, "drawn"), (0, "accepted"), (1, "bonus"), (0, "recovered")]
    assert sequence.take_provenance() == []
    plain = make_sequence(verified=2, pending=2)
    plain.accept(2)
    assert plain.take_provenance() == []


def test_forget_resumes_where_it_was() -> None:
    sequence = make_sequence(verified=2, pending=1)
    sequence.num_seen = [6, 5]
    sequence.forget()
    assert sequence.status is Status.WAITING
    assert (sequence.num_seen, sequence.resume_at) == ([0, 0], [6, 5])
    assert sequence.is_resuming
    assert [sequence.num_unseen(k) for k in range(2)] == [6, 5]
    sequence.num_seen = [6, 3]
    sequence.forget()
    assert sequence.resume_at == [6, 5]


def test_finish_counts_what_it_drops() -> None:
    sequence = make_sequence(verified=5, pending=2)
    sequence.finish(7)
    assert sequence.stats.num_discarded == 2
    assert len(sequence) == 7
    assert sequence.is_finished
    assert sequence.tail == []


@pytest.mark.parametrize("seed", range(20))
def test_counters_never_contradict_each_other(seed: int) -> None:
    rng = random.Random(seed)
    sequence = make_sequence()
    while not sequence.is_full:
        sequence.num_seen = [rng.randint(seen, len(sequence)) for seen in sequence.num_seen]
        action = rng.randrange(4)
        if action == 0:
            sequence.propose(1, Proposal(rng.randrange(2)))
        elif action == 1:
            sequence.accept(rng.randint(0, sequence.num_pending))
        elif action == 2 and sequence.num_pending:
            sequence.recover(2)
        elif not sequence.num_pending:
            sequence.draw(3)
        if rng.random() < 0.05:
            sequence.forget()
        sequence.check()

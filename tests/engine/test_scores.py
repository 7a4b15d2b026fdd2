"""What forwards have said is read as it was said, whether or not the store has got it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from server.cache.score_store import ScoreStore
from server.core.combination import Combination
from server.core.proposal import Proposal
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.decoding.warp import Place
from server.engine.scores import Scores
from server.runner.base import Batch, Span
from tests.support.engines import make_decoding
from tests.support.table_lm import TableLM, TableRunner, TableShortlist

PROMPT = [0, 2, 1]


@dataclass
class Desk:
    """Scores of one model over a store whose writes are counted by rows."""

    scores: Scores
    store: ScoreStore
    lm: TableLM
    num_written: int = 0

    def forward(self, places: list[Place], defer: bool = False) -> None:
        """The model reads all before each place; each text has a page of its own."""
        spans = [
            Span([1 + sequence.slot], 0, sequence.token_ids[:position], 1)
            for sequence, position in places
        ]
        self.scores.forward(0, Batch(tuple(spans)), places, defer)

    def expected(self, places: list[Place]) -> Tensor:
        rows = [self.lm.logits(sequence.token_ids[:position]) for sequence, position in places]
        return torch.tensor(np.array(rows), dtype=torch.float32)

    def check(self, places: list[Place]) -> None:
        assert torch.equal(self.scores.read(0, places), self.expected(places))


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    runner = TableRunner(lm := TableLM(1, vocab_size=4), page_size=16)
    runner.deferred = TableShortlist(runner, [0, 1])
    store = ScoreStore(4, 5, 4, [torch.float32], [torch.device("cpu")], state_sizes=[4])
    desk = Desk(Scores([runner], store), store, lm)
    write = store.write

    def counted(model: int, rows: list[int], logits: Tensor) -> None:
        desk.num_written += len(rows)
        write(model, rows, logits)

    monkeypatch.setattr(store, "write", counted)
    return desk


def start(desk: Desk, *tail: int) -> Sequence:
    decoding = make_decoding("cos", Combination.only(1, 0))
    sequence = Sequence.start("s", PROMPT, SamplingParams(max_tokens=8), decoding)
    for token_id in tail:
        sequence.propose(token_id, Proposal(0))
    sequence.slot = desk.store.take_slot()
    return sequence


def test_what_is_decided_before_the_next_forward_is_never_stored(desk: Desk) -> None:
    first, second = start(desk), start(desk)
    for _ in range(3):
        places = [(first, len(first)), (second, len(second))]
        desk.forward(places)
        desk.check(places)
        desk.check(places[::-1])
        desk.check(places[1:])
        for sequence in (first, second):
            sequence.draw(1)
    assert desk.num_written == 0


def test_open_places_outlive_memory_that_runs_out(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the store is given them: the step is undone, and they are wanted yet."""
    waits, goes_on = start(desk), start(desk)
    desk.forward([(waits, 3), (goes_on, 3)])
    goes_on.draw(2)

    def full(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as context:
        context.setattr(desk.store, "write", full)
        with pytest.raises(MemoryError):
            desk.forward([(goes_on, 4)])
    desk.check([(waits, 3)])
    desk.forward([(goes_on, 4)])
    desk.check([(waits, 3)])
    desk.check([(goes_on, 4)])


def test_open_places_outlive_the_next_forward(desk: Desk) -> None:
    waits, goes_on = start(desk), start(desk)
    desk.forward([(waits, 3), (goes_on, 3)])
    goes_on.draw(2)
    desk.forward([(goes_on, 4)])
    assert desk.num_written == 1
    desk.check([(waits, 3)])
    desk.check([(goes_on, 4)])
    assert desk.num_written == 1
    # Read together, they come from the store.
    desk.check([(goes_on, 4), (waits, 3)])
    assert desk.num_written == 2


def test_texts_that_ended_are_not_stored(desk: Desk) -> None:
    ended, goes_on = start(desk), start(desk)
    desk.forward([(ended, 3), (goes_on, 3)])
    desk.store.give_back(ended.slot)
    ended.slot = -1
    desk.forward([(start(desk), 3)])
    assert desk.num_written == 1
    desk.check([(goes_on, 3)])


def test_what_is_scored_anew_counts(desk: Desk) -> None:
    sequence = start(desk, 1, 2)
    desk.forward([(sequence, 3), (sequence, 4), (sequence, 5)])
    sequence.recover(3)  # in place of the first
    desk.forward([(sequence, 4)])
    desk.check([(sequence, 4)])


@pytest.mark.parametrize("deferred_last", [True, False])
def test_forwards_that_defer_take_turns_with_others(desk: Desk, deferred_last: bool) -> None:
    sequence = start(desk, 1)
    desk.forward([(sequence, 3), (sequence, 4)], defer=not deferred_last)
    desk.forward([(sequence, 4)], defer=deferred_last)
    desk.check([(sequence, 4)])
    desk.check([(sequence, 3), (sequence, 4)])


@pytest.mark.parametrize("deferred_last", [True, False])
def test_a_place_that_is_scored_anew_forgets_how_it_was_scored_before(
    desk: Desk, deferred_last: bool
) -> None:
    """Once more has been forwarded, which leaves both in the store."""
    sequence, other = start(desk, 1), start(desk)
    desk.forward([(sequence, 3), (sequence, 4)], defer=not deferred_last)
    desk.forward([(other, 3)])
    sequence.recover(3)
    desk.forward([(sequence, 4)], defer=deferred_last)
    desk.forward([(other, 3)])
    desk.check([(sequence, 4), (other, 3)])

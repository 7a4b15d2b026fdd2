"""Who waits on a stream of shared coins, so that all want the same model."""

from __future__ import annotations

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.decoding.strategies import SharedCoins

WEIGHTED = Combination.weighted((0.5, 0.5))


def sequence_at(coin: int | None, kappa: int = 0, num_generated: int = 3) -> Sequence:
    """One whose next position takes that coin of the stream."""
    decoding = DecodingParams("mixture", WEIGHTED, (1, 1), kappa, shared_coins=True)
    sequence = Sequence.start(f"at-{coin}", [1, 2], SamplingParams(), decoding)
    for token in range(num_generated):
        sequence.draw(token)
    sequence.coin_base = None if coin is None else coin - len(sequence)
    return sequence


def test_who_is_a_little_ahead_waits() -> None:
    first, level, one, two, far = (sequence_at(coin) for coin in (7, 7, 8, 9, 30))
    assert SharedCoins(0).ahead([far, one, level, two, first]) == {one, two}


def test_nobody_waits_for_one_that_moves_on_by_itself() -> None:
    ahead = sequence_at(8)
    resuming = sequence_at(7)
    resuming.resume_at[0] = len(resuming)
    others = [
        resuming,
        sequence_at(7, kappa=1),
        sequence_at(7, num_generated=0),
        sequence_at(None),
        sequence_at(5),
        sequence_at(9, kappa=1),
    ]
    assert SharedCoins(0).ahead([ahead, *others]) == set()

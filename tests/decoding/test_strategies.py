from __future__ import annotations

from server.core.combination import Combination
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.decoding.strategies import SharedCoins, Strategies, used_models
from tests.support.engines import make_decoding


def test_a_strategy_is_of_its_own_parameters() -> None:
    """Though those of requests that are gone leave their memory to others."""
    strategies = Strategies(SharedCoins(0))
    for number in range(1, 100):
        for weight in (0.0, 0.0, 1 / number):
            combination = Combination.weighted([weight, 1 - weight])
            decoding = make_decoding("standard", combination)
            sequence = Sequence.start("s", [1], SamplingParams(), decoding)
            assert strategies.of(sequence).target(sequence, 1) == combination
            del sequence, decoding


def test_models_that_only_propose_are_used_too() -> None:
    last = Combination.weighted([0.0, 0.0, 1.0])
    for strategy, gamma, expected in (
        ("standard", (3, 1, 1), {2}),
        ("speculative", (3, 1, 1), {0, 2}),
        ("cos", (0, 2, 1), {1, 2}),
    ):
        assert used_models(make_decoding(strategy, last, gamma)) == expected

"""How far what a way of decoding takes is uncertain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams
from server.decoding.strategies import SharedCoins, Strategies
from server.engine.cost_table import CostTable
from server.engine.predictor import Predictor, Uncertainty
from server.engine.rates import Rates
from tests.engine.test_controller import make_costs

COS = DecodingParams("cos", Combination.contrastive(2, 0.1), (3, 1))
RATES = Rates((0.6, 0.8))


def make_predictor(costs: CostTable) -> Predictor:
    return Predictor(costs, Strategies(SharedCoins(0)))


@pytest.mark.parametrize("batch", [1, 16])
def test_doubt_is_of_the_seconds_that_are_doubtful(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of those that the first model takes."""
    both, first = make_costs((0.05, 0, 0), (0.1, 0, 0)), make_costs((0.05, 0, 0), (0, 0, 0))
    monkeypatch.setattr(both, "doubt", lambda model, batch, tokens: 0.0 if model else 0.2)
    share, whole = (
        make_predictor(costs).token_seconds(COS, RATES, batch) for costs in (first, both)
    )
    uncertainty = make_predictor(both).uncertainty(COS, RATES, batch)
    assert uncertainty.doubt == pytest.approx(0.2 * share / whole)


@pytest.mark.parametrize(
    ("expert", "upside"),
    [
        ((0.1, 0, 0), 1.0),  # more tokens cost nothing now: they will not cost less
        ((0.0, 0, 0.1), 1 / (1 - 0.2)),
    ],
)
def test_forwards_may_be_faster_than_timed_but_not_than_those_of_one_token(
    expert: tuple[float, float, float], upside: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = make_costs((0, 0, 0), expert)
    monkeypatch.setattr(costs, "doubt", lambda model, batch, tokens: 0.2)
    always = replace(COS, gamma=(3, 0))
    found = make_predictor(costs).uncertainty(always, RATES, 1)
    assert (found.doubt, found.upside) == pytest.approx((0.2, upside))


def test_of_standard_decoding_nothing_is_hoped() -> None:
    """It is what all else is held against."""
    costs = make_costs((0.05, 0, 0.01), (0.1, 0, 0.02))
    standard = replace(COS, strategy="standard")
    found = make_predictor(costs).uncertainty(standard, RATES, 4)
    assert found.doubt > 0.05
    assert found.upside == 1.0


def test_mixtures_are_certain() -> None:
    """They consist of what standard decoding does, and some tokens more."""
    mixture = replace(COS, strategy="mixture", combination=Combination.weighted([0.5, 0.5]))
    predictor = make_predictor(make_costs((0.1, 0, 0), (0.1, 0, 0)))
    assert predictor.uncertainty(mixture, RATES, 4) == Uncertainty()


def test_a_mixture_draws_forced_tokens_too() -> None:
    weighted = Combination.weighted([0.5, 0.5])
    mixture = replace(COS, strategy="mixture", combination=weighted, shared_coins=True)
    predictor = make_predictor(make_costs((0.1, 0, 0), (0.1, 0, 0)))
    free, form = (
        predictor.token_seconds(mixture, Rates((0.6, 0.8), runs=runs, forced=3 * runs), 4)
        for runs in (0.0, 0.5)
    )
    assert form == pytest.approx(free * (1 + 1.5))


def test_few_sequences_feed_forced_tokens_in_some_steps_and_many_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forwards were timed if they were either without them or with as many as on average."""
    costs = make_costs((0.05, 0, 0.01), (0.1, 0, 0.02))
    standard = replace(COS, strategy="standard")
    rates = Rates((0.6, 0.8), runs=0.25, forced=0.75)
    for timed in (1.0, 1.75):
        doubts = {1.0: 0.08, 1.75: 0.08, timed: 0.01}
        monkeypatch.setattr(
            costs, "doubt", lambda model, batch, tokens, known=doubts: known[tokens]
        )
        assert make_predictor(costs).uncertainty(standard, rates, 4).doubt == pytest.approx(0.01)

"""What is counted of the steps between two choices."""

from __future__ import annotations

from typing import Any

import pytest

from server.core.combination import Combination
from server.core.lookup import LOOKUP
from server.core.sampling_params import DecodingParams
from server.core.stats import Delivery, StepStats
from server.engine.cost_table import CostTable
from server.engine.interval import Interval
from tests.engine.test_controller import make_costs

COS = DecodingParams("cos", Combination.contrastive(2, 0.1), (1, 1))


def costs_on(slowness: float) -> CostTable:
    """Forwards take 0.1 seconds, times `slowness` by now."""
    costs = make_costs((0.1, 0, 0))
    for _ in range(100):
        costs.observe(StepStats(0, 1, 1, 1, forward_seconds=0.1 * slowness))
    return costs


def step(num_tokens: int = 0, has_first: bool = False, **counts: Any) -> StepStats:
    deliveries = [Delivery(COS, num_tokens, has_first)]
    return StepStats(0, 1, 1, 1, deliveries=deliveries, **counts)


def test_tokens_and_seconds_count_once_it_is_pure() -> None:
    interval, costs = Interval(), costs_on(1.0)
    interval.add(step(3), 1, costs)
    assert (interval.num_steps, interval.total_tokens, interval.seconds) == (1, 0, 0.0)
    interval.is_pure = True
    interval.add(step(3), 1, costs)
    interval.add(step(2, has_first=True), 4, costs)
    assert (interval.num_steps, interval.num_tokens) == (3, {1: 3, 4: 1})
    assert interval.seconds == pytest.approx(0.2, rel=0.01)


def test_seconds_are_those_of_a_machine_as_fast_as_at_first() -> None:
    interval, costs = Interval(is_pure=True), costs_on(2.0)
    interval.add(step(1), 1, costs)
    assert costs.slowness > 1.8
    assert costs.price(step(1)) == pytest.approx(0.2, rel=0.01)
    assert interval.seconds == pytest.approx(0.1, rel=0.1)


def test_the_batch_is_that_of_most_tokens() -> None:
    interval = Interval(num_tokens={4: 1, 16: 9, 2: 5})
    assert interval.main_batch == 16
    assert interval.total_tokens == 15


def test_what_prompt_lookup_proposed_counts_where_it_is_decided_too() -> None:
    """That may be in another interval, whose steps it shortens."""
    interval, costs = Interval(), costs_on(1.0)
    interval.add(step(num_looked_up=2), 1, costs)
    assert interval.num_looked_up == 2
    decided = [(LOOKUP, 0, True), (LOOKUP, 1, False), (0, 0, True)]
    interval.add(step(verified_by_offset=decided), 1, costs)
    assert interval.num_looked_up == 4


def test_what_is_too_short_goes_on_in_the_next() -> None:
    before = Interval(1.0, True, 16, seconds=0.5, num_tokens={1: 3})
    interval = Interval(begun_at=2.0)
    interval.go_on_from(before)
    assert interval == Interval(begun_at=2.0, seconds=0.5, num_tokens={1: 3})

"""How often forms leave no choice, as far as it is known."""

from __future__ import annotations

import pytest

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams
from server.core.stats import Delivery
from server.engine.forced_rates import ForcedRates
from server.engine.kind import Kind

FORM, OTHER, FREE = Kind("free", True), Kind("greedy", True), Kind("free", False)


def delivery(chosen: int, forced: int) -> Delivery:
    decoding = DecodingParams("standard", Combination.contrastive(2, 0.1), (1, 1))
    return Delivery(decoding, chosen + forced, has_first=False, num_forced=forced)


def test_runs_and_forced_tokens_are_of_those_that_are_chosen() -> None:
    rates = ForcedRates()
    for _ in range(2000):
        rates.add(FORM, delivery(2, 3))
        rates.add(FORM, delivery(1, 0))
    assert rates.of(FORM) == pytest.approx((1 / 3, 1.0), rel=0.03)


def test_a_run_that_takes_several_steps_is_one() -> None:
    rates = ForcedRates()
    for _ in range(2000):
        rates.add(FORM, delivery(4, 8))
        rates.add(FORM, delivery(0, 8))
        rates.add(FORM, delivery(0, 2))
    assert rates.of(FORM) == pytest.approx((1 / 4, 18 / 4), rel=0.03)


def test_nothing_is_known_of_other_kinds() -> None:
    rates = ForcedRates()
    for kind in (FORM, FREE):
        rates.add(kind, delivery(10, 10))
    assert rates.of(FORM) == pytest.approx((1 / 18, 10 / 18))
    assert rates.of(OTHER) == rates.of(FREE) == (0.0, 0.0)


def test_what_was_long_ago_is_forgotten() -> None:
    rates = ForcedRates()
    for forced, chosen in ((4, 4000), (0, 400)):
        for _ in range(chosen // 4):
            rates.add(FORM, delivery(4, forced))
    runs, forced_rate = rates.of(FORM)
    assert forced_rate == pytest.approx(0.37, abs=0.02)
    assert runs == pytest.approx(0.37 / 4, abs=0.01)

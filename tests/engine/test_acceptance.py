"""How often proposals are accepted, as far as it is known."""

from __future__ import annotations

import math

import pytest

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.engine.acceptance import AcceptanceRates

AUTO = DecodingParams("auto", Combination.contrastive(2, 0.1), (1, 1), is_gamma_auto=True)
GUESS = 0.6


def make_sequence(accepted: int = 0, verified: int = 0) -> Sequence:
    """One whose proposals of model 0 came out so."""
    sequence = Sequence.start("s", [1], SamplingParams(), AUTO)
    sequence.stats.accepted[0], sequence.stats.verified[0] = accepted, verified
    return sequence


def test_it_begins_with_a_guess_and_keeps_to_what_was_seen_lately() -> None:
    rates, sequence = AcceptanceRates(), make_sequence()
    assert rates.mean([sequence]) == pytest.approx((GUESS, GUESS))
    for _ in range(4):
        rates.add(sequence, 0, 0.0)
    assert rates.mean([sequence])[0] == pytest.approx(GUESS / 2, abs=0.01), "it counts for four"
    for _ in range(400):
        rates.add(sequence, 0, 1.0)
    assert rates.mean([sequence])[0] == pytest.approx(0.98, abs=0.01)
    for _ in range(400):
        rates.add(sequence, 0, 0.0)
    assert rates.mean([sequence])[0] == pytest.approx(1 / (1 + math.e), abs=0.01)
    assert rates.mean([sequence])[1] == pytest.approx(GUESS)


def test_a_text_counts_for_itself_beside_its_kind() -> None:
    """As much with 24 proposals."""
    rates = AcceptanceRates()
    assert rates.mean([make_sequence(0, 24)])[0] == pytest.approx(GUESS / 2)
    assert rates.mean([make_sequence(24, 24)])[0] == pytest.approx((1 + GUESS) / 2)
    both = rates.mean([make_sequence(0, 24), make_sequence(24, 24)])[0]
    assert both == pytest.approx((0.5 + GUESS) / 2)


def test_what_nothing_tests_is_forgotten() -> None:
    rates, sequence = AcceptanceRates(), make_sequence()
    for model in (0, 1) * 1000:
        rates.add(sequence, model, 0.0)
    rates.fade(sequence, [0], 0.0)
    low = rates.mean([sequence])
    assert low == pytest.approx((0.0, 0.0), abs=0.02)
    rates.fade(sequence, [0], 1200.0)
    assert rates.mean([sequence])[0] == pytest.approx(GUESS, abs=0.01)
    assert rates.mean([sequence])[1] == low[1], "the other is tested"

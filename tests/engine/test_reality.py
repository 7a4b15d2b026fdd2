"""Seconds over predicted ones, by strategy and lengths."""

from __future__ import annotations

import pytest

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams
from server.engine.reality import Reality

SHORT, LONG, SILENT = (
    DecodingParams("cos", Combination.contrastive(2, 0.1), gamma)
    for gamma in ((1, 1), (4, 1), (0, 2))
)


def test_lengths_are_told_apart_and_the_untried_are_like_the_others() -> None:
    reality = Reality()
    assert reality.value(SHORT, 16) == 1
    for _ in range(100):
        reality.add(SHORT, 16, 1.0, predicted=1.0)
        reality.add(LONG, 16, 1.5, predicted=1.0)
    assert reality.value(SHORT, 16) == pytest.approx(1.0, abs=0.05)
    assert reality.value(LONG, 16) == pytest.approx(1.5, abs=0.05)
    assert reality.value(SILENT, 16) == pytest.approx(1.25, abs=0.05)


def test_about_as_many_sequences_are_one_place() -> None:
    reality = Reality()
    for _ in range(100):
        reality.add(LONG, 16, 1.5, predicted=1.0)
    assert reality.value(LONG, 15) == reality.value(LONG, 20) == reality.value(LONG, 16)
    assert reality.value(LONG, 4) == 1


def test_what_is_old_is_forgotten() -> None:
    reality = Reality()
    for _ in range(100):
        reality.add(LONG, 16, 1.5, predicted=1.0)
    reality.forget(1200.0)
    assert reality.value(LONG, 16) == pytest.approx(1.0, abs=0.01)

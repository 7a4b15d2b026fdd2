"""`auto` against standard decoding and the best of the others, on a clock without noise or with."""

from __future__ import annotations

from functools import cache

import pytest

from server.core.sampling_params import DecodingParams
from tests.support.laboratory import CONTRASTIVE, Laboratory, Load, Measured, drifting

STANDARD = DecodingParams("standard", CONTRASTIVE, (1, 1))
COS = DecodingParams("cos", CONTRASTIVE, (1, 1))
AUTO = DecodingParams("auto", CONTRASTIVE, (2, 1), is_gamma_auto=True)
SHORT = (3, 30)


def second_run(laboratory: Laboratory, load: Load, decoding: DecodingParams) -> Measured:
    """After other requests of the same kind."""
    laboratory.run(load, decoding, seed=9)
    return laboratory.run(load, decoding, seed=1)


@cache
def of_standard(load: Load, acceptance: tuple[float, float]) -> float:
    """Seconds of work of a token; the same whatever came before."""
    return Laboratory(acceptance).run(load, STANDARD, seed=1).token_seconds


@pytest.mark.parametrize(
    ("load", "mistimed"),
    [(Load(16, 32), 1), (Load(16, 32, answer=SHORT), None), (Load(32, 40), None)],
    ids=["16", "short", "32"],
)
def test_where_nothing_pays_it_is_standard(load: Load, mistimed: int | None) -> None:
    """More rows cost in proportion there, and half of what is proposed is thrown away."""
    acceptance = (0.5, 0.95)
    laboratory = Laboratory(acceptance, mistimed=mistimed)
    taken = second_run(laboratory, load, AUTO).token_seconds
    assert taken <= 1.02 * of_standard(load, acceptance)


def test_where_something_pays_it_is_taken() -> None:
    load, acceptance = Load(1, 4), (0.5, 0.95)
    best = Laboratory(acceptance).run(load, COS, seed=1).token_seconds
    assert best < 0.85 * of_standard(load, acceptance)
    for mistimed in (None, 3):
        taken = second_run(Laboratory(acceptance, mistimed=mistimed), load, AUTO).token_seconds
        assert taken <= 1.04 * best


def test_a_machine_whose_speed_drifts() -> None:
    load, acceptance = Load(16, 32), (0.5, 0.95)
    taken = []
    for seed in range(1, 5):
        laboratory = Laboratory(acceptance, clock=drifting(seed), mistimed=seed)
        measured = second_run(laboratory, load, AUTO)
        taken.append(measured.token_seconds / of_standard(load, acceptance))
        assert laboratory.run(load, STANDARD).estimated == pytest.approx(1.0, abs=0.05)
    assert max(taken) <= 1.03
    assert sum(taken) / len(taken) <= 1.015


@pytest.mark.parametrize("seed", [1, 2])
def test_the_estimate_on_a_machine_whose_speed_drifts(seed: int) -> None:
    """The seconds of the two runs are compared without the drift, the estimate is made in it."""
    load = Load(1, 6, prompt=(8, 16))
    quiet = Laboratory()
    plain = quiet.run(load, STANDARD, seed=1).decode_token_seconds
    ratio = plain / quiet.run(load, COS, seed=1).decode_token_seconds
    laboratory = Laboratory(clock=drifting(seed))
    assert laboratory.run(load, STANDARD).estimated == pytest.approx(1.0, abs=0.05)
    assert laboratory.run(load, COS, seed=1).estimated == pytest.approx(ratio, rel=0.1)

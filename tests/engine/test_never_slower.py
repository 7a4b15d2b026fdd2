"""`auto` against standard decoding and the best of the others, on a clock without noise or with."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams
from server.core.stats import StepStats
from server.decoding.profile import Chain
from server.decoding.strategies import SharedCoins, Strategies
from server.engine.kind import Kind
from server.engine.rates import Rates
from tests.support.laboratory import (
    CONTRASTIVE,
    EXPERT,
    PROPOSER,
    Laboratory,
    Load,
    Measured,
    drifting,
)

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


def test_what_was_timed_too_dear_is_tried() -> None:
    """By the table nothing pays; only doing it shows that it does.

    Not in every run: while nothing proposes, how much is accepted is known from a few probes.
    """
    load, acceptance = Load(16, 96, prompt=(8, 16), answer=(24, 72)), (0.65, 0.97)
    costs = (replace(PROPOSER, beyond=0.001), replace(EXPERT, beyond=0.0019))
    found = 0
    for seed in range(5):
        best = Laboratory(acceptance, costs).run(load, COS, seed=seed + 1).token_seconds
        plain = Laboratory(acceptance, costs).run(load, STANDARD, seed=seed + 1).token_seconds
        assert best < 0.93 * plain
        laboratory = Laboratory(acceptance, costs, dearer=1.10)
        laboratory.run(load, AUTO, seed=seed)
        found += laboratory.run(load, AUTO, seed=seed + 1).token_seconds <= 1.03 * best
    assert found >= 4


@pytest.mark.parametrize("concurrency", [16, 32])
def test_standard_is_timed_before_little_is_gained(concurrency: int) -> None:
    """From the start on: calibration may have had standard decoding dearer than it is."""
    load, acceptance = Load(concurrency, 2 * concurrency), (0.3, 0.9)
    plain = Laboratory(acceptance).run(load, STANDARD, seed=0).token_seconds
    for mistimed in (2, 8):
        laboratory = Laboratory(acceptance, mistimed=mistimed)
        assert laboratory.run(load, AUTO, seed=0).token_seconds <= 1.04 * plain


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


def test_texts_of_a_mixture_move_together() -> None:
    """Though they begin at different times: all want the model that one coin names."""
    weighted = Combination.weighted((0.5, 0.5))
    decoding = DecodingParams("auto", weighted, (2, 1), is_gamma_auto=True, shared_coins=True)
    load = Load(1, 1, answer=(400, 400), temperature=1.0, is_seeded=False)
    laboratory = Laboratory(costs=(EXPERT, EXPERT))
    rng = random.Random(0)
    steps: list[StepStats] = []
    laboratory.engine.observer.on_step = steps.append
    for _ in range(8):
        laboratory.send(load, decoding, rng)
        for _ in range(5):
            laboratory.engine.step()
    steps.clear()
    for _ in range(100):
        laboratory.engine.step()
    assert all(delivery.decoding.shared_coins for step in steps for delivery in step.deliveries)
    assert [step.num_decoding for step in steps] == [8] * 100


@pytest.mark.parametrize("gamma", [(1, 1), (0, 2), (2, 1), (4, 1)])
def test_so_many_take_part_in_a_forward_as_predicted(gamma: tuple[int, int]) -> None:
    decoding = DecodingParams("cos", CONTRASTIVE, gamma)
    load = Load(16, 96, prompt=(8, 16), answer=(24, 72))
    steps = Laboratory((0.6, 0.97)).run(load, decoding, seed=1).steps
    chain = Chain(decoding, Strategies(SharedCoins(0)).make(decoding))
    shares = chain.profile((0.6 * 0.97, 0.97)).shares
    for model in (0, 1):
        taking_part = [
            step.num_decoding
            for step in steps
            if step.model == model and step.num_running == 16 and not step.num_prefill_tokens
        ]
        mean = sum(taking_part) / len(taking_part) / 16
        assert mean == pytest.approx(shares[model], abs=0.1)
        assert mean > 0.85


FORM = Load(1, 4, prompt=(8, 16), answer=(100, 140), runs=0.25)


@pytest.mark.parametrize("decoding", [STANDARD, COS, replace(COS, gamma=(3, 1))])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_texts_of_a_form_take_what_is_predicted(decoding: DecodingParams, concurrency: int) -> None:
    """Where a quarter of the tokens is followed by three forced ones, which end drafts."""
    acceptance = (0.6, 0.97)
    laboratory = Laboratory(acceptance)
    load = replace(FORM, concurrency=concurrency, num_requests=4 * concurrency)
    measured = laboratory.run(load, decoding, seed=1)
    controller, costs = laboratory.engine.observer.controller, laboratory.engine.observer.costs
    assert controller is not None
    assert costs is not None
    kind = Kind("greedy", has_grammar=True)
    runs, forced = controller._forced.of(kind)
    assert (runs, forced) == pytest.approx((0.25, 0.75), rel=0.2)
    rates = Rates((0.6 * 0.97, 0.97), runs, forced)
    predicted = controller._predictor.token_seconds(decoding, rates, concurrency)
    full = [s for s in measured.steps if s.num_decoding > 0.8 * concurrency]
    whole = replace(measured, steps=full)
    assert whole.decode_token_seconds == pytest.approx(predicted, rel=0.06)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_estimate_of_standard_decoding_of_a_form_is_standard_decoding(
    concurrency: int,
) -> None:
    load = replace(FORM, concurrency=concurrency, num_requests=4 * concurrency)
    assert Laboratory().run(load, STANDARD).estimated == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize(("concurrency", "rate"), [(1, 0.8), (4, 0.4), (16, 0.4)])
def test_forms_are_decoded_as_pays(concurrency: int, rate: float) -> None:
    """Drafts that end early pay less than those of free texts."""
    acceptance = (rate, 0.97)
    load = replace(FORM, concurrency=concurrency, num_requests=12 * concurrency, answer=SHORT)
    taken = second_run(Laboratory(acceptance), load, AUTO).token_seconds
    best = min(
        Laboratory(acceptance).run(load, decoding, seed=1).token_seconds
        for decoding in (STANDARD, COS)
    )
    assert taken <= 1.03 * best

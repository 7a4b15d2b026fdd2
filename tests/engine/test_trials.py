"""What is done about a way of decoding that may be faster than standard decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams
from server.engine.predictor import Uncertainty
from server.engine.trials import Candidate, Judgement, Trials, judge

TAKE, TRY, LEAVE = Judgement.TAKE, Judgement.TRY, Judgement.LEAVE
TIME_BASELINE = Judgement.TIME_BASELINE
COS = DecodingParams("cos", Combination.contrastive(2, 0.1), (1, 1))
LONGER = replace(COS, gamma=(4, 1))
BASELINE = replace(COS, strategy="standard")
KNOWN = 0.0  # the baseline's doubt


def make_candidate(
    speedup: float = 1.05,
    doubt: float = 0.1,
    upside: float = 1.1,
    choice: DecodingParams = COS,
) -> Candidate:
    """One that pays if nothing is uncertain; by default its forwards were not timed."""
    return Candidate(choice, speedup, Uncertainty(doubt, upside))


@pytest.mark.parametrize(
    ("speedup", "doubt", "baseline_doubt", "is_stale", "may_try", "judgement"),
    [
        # More than what is uncertain.
        (1.20, 0.10, 0.02, False, True, TAKE),
        (1.20, 0.10, 0.02, False, False, TAKE),
        (1.20, 0.10, 0.02, True, True, TAKE),
        (1.20, 0.10, 0.08, True, True, TIME_BASELINE),
        (1.20, 0.10, 0.08, True, False, TAKE),
        # Less, and timed.
        (1.05, 0.03, 0.02, False, True, TAKE),
        (1.05, 0.03, 0.08, True, True, TIME_BASELINE),
        (1.05, 0.03, 0.02, False, False, LEAVE),
        # Less, and not timed.
        (1.05, 0.10, 0.02, False, True, TRY),
        (1.05, 0.10, 0.08, True, True, TIME_BASELINE),
        (1.05, 0.10, 0.02, False, False, LEAVE),
        (0.98, 0.10, 0.02, False, True, TRY),
    ],
)
def test_verdicts(
    speedup: float,
    doubt: float,
    baseline_doubt: float,
    is_stale: bool,
    may_try: bool,
    judgement: Judgement,
) -> None:
    candidate = make_candidate(speedup, doubt)
    assert judge(candidate, baseline_doubt, is_stale, may_try) is judgement


@pytest.mark.parametrize(
    ("judgement", "is_for_candidate", "is_final"),
    [
        (TAKE, True, True),
        (TRY, True, False),
        (TIME_BASELINE, False, False),
        (LEAVE, False, True),
    ],
)
def test_what_verdicts_mean(judgement: Judgement, is_for_candidate: bool, is_final: bool) -> None:
    assert judgement.is_for_candidate is is_for_candidate
    assert judgement.is_final is is_final


def proceed(
    trials: Trials, candidate: Candidate, now: float = 0.0, times: int = 1
) -> list[Judgement]:
    """Each after 16 steps."""
    return [trials.proceed(candidate, KNOWN, 16, now) for _ in range(times)]


def test_a_trial_that_times_nothing_is_paused() -> None:
    """As where prompts are read in every step: it would go on for ever."""
    trials, candidate = Trials(), make_candidate()
    assert proceed(trials, candidate, now=10.0, times=5) == [TRY, TRY, TRY, LEAVE, LEAVE]
    assert proceed(trials, candidate, now=129.9) == [LEAVE]
    assert proceed(trials, candidate, now=130.0, times=4) == [TRY, TRY, TRY, LEAVE]


def test_steps_of_a_trial_that_ended_do_not_count_for_the_next() -> None:
    trials, timed = Trials(), make_candidate(doubt=0.03)
    for _ in range(3):
        assert proceed(trials, make_candidate(), times=2) == [TRY, TRY]
        assert proceed(trials, timed) == [TAKE]


def test_a_pause_is_of_one_candidate_and_of_what_is_uncertain() -> None:
    trials = Trials()
    assert proceed(trials, make_candidate(), times=4)[-1] is LEAVE
    assert proceed(trials, make_candidate(choice=LONGER)) == [TRY]
    assert proceed(trials, make_candidate(speedup=1.2)) == [TAKE]


def test_the_baseline_is_timed_before_until_it_is_known_well() -> None:
    """Not only as well as it was when that began to be too little."""
    trials, candidate = Trials(), make_candidate()
    doubts = {0.06: TRY, 0.08: TIME_BASELINE, 0.061: TIME_BASELINE, 0.04: TRY, 0.062: TRY}
    for doubt, judgement in doubts.items():
        assert trials.proceed(candidate, doubt, 0, 0.0) is judgement


def test_a_pause_says_nothing_of_the_baseline() -> None:
    """What is not compared with it need not have it timed."""
    trials, candidate = Trials(), make_candidate()
    proceed(trials, candidate, times=4)
    assert trials.proceed(candidate, 0.08, 0, 0.0) is LEAVE
    assert trials.proceed(candidate, 0.06, 0, 120.0) is TRY


def test_hopeful_is_what_may_pay_and_was_not_timed() -> None:
    trials = Trials()
    low, high = make_candidate(0.95), make_candidate(0.97, choice=LONGER)

    def most_hopeful(*candidates: Candidate, chosen: DecodingParams = BASELINE) -> object:
        found = trials.most_hopeful(candidates, chosen, 0.0)
        return None if found is None else found.choice

    assert most_hopeful() is None
    assert most_hopeful(low, high) == LONGER
    assert most_hopeful(high, low, chosen=COS) == COS, "what is being tried goes on"
    assert most_hopeful(make_candidate(0.95, upside=1.08)) is None, "not even with luck"
    assert most_hopeful(make_candidate(0.95, upside=1.09)) == COS
    assert most_hopeful(make_candidate(0.95, doubt=0.045), high) == LONGER, "it is known"
    assert most_hopeful(Candidate(BASELINE, 1.0, Uncertainty(0.1)), low) == COS
    proceed(trials, high, times=4)
    assert most_hopeful(low, high) == COS, "the other is paused"
    assert trials.most_hopeful([low, high], BASELINE, 120.0) is high

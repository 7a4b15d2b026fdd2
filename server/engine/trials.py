"""Whether a way of decoding is worth doing instead of standard decoding, or worth trying.

Words:

    baseline    standard decoding
    candidate   a way of decoding that may be faster than the baseline
    speedup     predicted seconds of a verified token by the baseline, over those by the candidate
    doubt       relative deviation of seconds: forwards that were not timed lately may take others
    trial       decoding by a candidate for some steps, so that its forwards are timed

A candidate is done where its speedup exceeds a margin by more than its doubt. Where it might, by
its upper bound, it is tried (optimism in the face of uncertainty); once its forwards are timed,
the speedup itself counts. And where a speedup is small, the baseline has to be timed before: the
two are then compared with each other, and not with a machine of another time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from server.core.sampling_params import DecodingParams
from server.engine.predictor import Uncertainty

# Below it a wrong guess costs more than there is to gain.
MARGIN = 1.03
# Doubts: above the first the baseline is stale until it is below the second; below that one,
# forwards count as timed.
_STALE = 0.07
_TIMED = 0.045
_TRIAL_STEPS = 48  # that a trial may last; what reads prompts all the time cannot be timed
_PAUSE_SECONDS = 120.0  # of decoding, after a trial that could not be ended


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way of decoding beside the baseline.

    Attributes:
        choice: the way of decoding.
        speedup: that is predicted.
        uncertainty: of its seconds.
    """

    choice: DecodingParams
    speedup: float
    uncertainty: Uncertainty

    @property
    def is_timed(self) -> bool:
        """Its forwards were timed lately."""
        return self.uncertainty.doubt <= _TIMED

    @property
    def upper(self) -> float:
        """The speedup, were it as fast as it may turn out to be."""
        return self.speedup * self.uncertainty.upside

    def lower(self, baseline_doubt: float = 0.0) -> float:
        """The speedup without what is uncertain of it, and of the baseline."""
        return self.speedup * (1 - self.uncertainty.doubt - baseline_doubt)


class Judgement(Enum):
    """What is to be done about a candidate."""

    TAKE = auto()  # decode by it
    TRY = auto()  # decode by it, so that it is timed
    TIME_BASELINE = auto()  # decode by the baseline, so that it is timed
    LEAVE = auto()  # decode by the baseline

    @property
    def is_for_candidate(self) -> bool:
        """Decode by it."""
        return self in (Judgement.TAKE, Judgement.TRY)

    @property
    def is_final(self) -> bool:
        """Nothing has to be timed before."""
        return self in (Judgement.TAKE, Judgement.LEAVE)


def judge(
    candidate: Candidate, baseline_doubt: float, is_baseline_stale: bool, may_try: bool
) -> Judgement:
    """Weigh a candidate whose speedup is at least MARGIN, or which is not timed and may reach it.

    Args:
        candidate: what may be done instead of the baseline.
        baseline_doubt: of the baseline's seconds.
        is_baseline_stale: they are too uncertain to compare anything with, if it is close.
        may_try: something may be done only in order to time it.
    """
    is_sure = candidate.lower() >= MARGIN
    if not may_try:
        return Judgement.TAKE if is_sure else Judgement.LEAVE
    if is_baseline_stale and candidate.lower(baseline_doubt) < MARGIN:
        return Judgement.TIME_BASELINE
    return Judgement.TAKE if is_sure or candidate.is_timed else Judgement.TRY


@dataclass(slots=True)
class _Trial:
    """Of one candidate.

    Attributes:
        num_steps: that came before each judgement, since the last final one.
        paused_until: seconds of decoding.
    """

    num_steps: int = 0
    paused_until: float = 0.0


class Trials:
    """What sequences that are decoded alike have tried, and whether their baseline is timed."""

    def __init__(self) -> None:
        self._trials: dict[DecodingParams, _Trial] = {}
        self._is_baseline_stale = False

    def most_hopeful(
        self, candidates: Iterable[Candidate], chosen: DecodingParams, now: float
    ) -> Candidate | None:
        """Of what is not timed, the one that may pay most; first of all what is tried already.

        Args:
            candidates: what was compared; the baseline may be among them, and is not hopeful.
            chosen: how it is decoded at present.
            now: seconds of decoding.
        """
        hopeful = [
            candidate
            for candidate in candidates
            if not candidate.is_timed
            and candidate.upper >= MARGIN
            and not self._is_paused(candidate.choice, now)
        ]
        return max(hopeful, key=lambda each: (each.choice == chosen, each.upper), default=None)

    def proceed(
        self, candidate: Candidate, baseline_doubt: float, num_steps: int, now: float
    ) -> Judgement:
        """Begin, go on with or end the trial of a candidate, by what `judge` says of it.

        One that has gone on for too long is paused; it is not compared with the baseline then, and
        whether that one is stale is not looked at.

        Args:
            candidate: as in `judge`.
            baseline_doubt: of the baseline's seconds.
            num_steps: that were decoded since something was chosen last.
            now: seconds of decoding.
        """
        trial = self._trials.setdefault(candidate.choice, _Trial())
        trial.num_steps += num_steps
        if trial.num_steps > _TRIAL_STEPS:
            trial.paused_until = now + _PAUSE_SECONDS
        may_try = not self._is_paused(candidate.choice, now)
        if may_try:
            limit = _TIMED if self._is_baseline_stale else _STALE
            self._is_baseline_stale = baseline_doubt > limit
        judgement = judge(candidate, baseline_doubt, self._is_baseline_stale, may_try)
        if judgement.is_final:
            trial.num_steps = 0
        return judgement

    def _is_paused(self, choice: DecodingParams, now: float) -> bool:
        trial = self._trials.get(choice)
        return trial is not None and now < trial.paused_until

"""Judging models that propose nothing: would their tokens have been accepted?"""

from __future__ import annotations

from collections.abc import Iterable

from server.core.sequence import Sequence
from server.decoding.strategies import Strategies
from server.engine.distributions import Distributions

# Tokens that are drawn, for each that is probed; and steps from one to the next, at least.
_PERIOD = 32
_STEPS = 8


class Probes:
    """Tells who chooses, now and then, of tokens that were drawn with nothing proposed."""

    def __init__(self, strategies: Strategies, distributions: Distributions) -> None:
        self._strategies = strategies
        self._distributions = distributions
        self._num_draws = 0  # since the last probe
        self._num_probes = 0

    def look(self, drawn: Iterable[Sequence]) -> None:
        """At sequences whose last token has just been drawn; their scores are still there.

        The position is decided, so what is learnt says nothing of tokens to come.
        """
        chooser = self._strategies.chooser
        candidates = [s for s in drawn if s.decoding.is_auto and s.coin_base is None]
        if chooser is None or not candidates:
            return
        self._num_draws += len(candidates)
        if self._num_draws < max(_PERIOD, _STEPS * len(candidates)):
            return
        self._num_draws = 0
        self._num_probes += 1
        sequence = candidates[self._num_probes % len(candidates)]
        place = (sequence, len(sequence) - 1)
        for model in sequence.decoding.combination.scorers:
            chooser.add(sequence, model, self._distributions.overlap(model, place))

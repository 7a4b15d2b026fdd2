"""How often what each model proposes is accepted."""

from __future__ import annotations

import math

from server.core.sequence import Sequence

_PRIOR_ACCEPTANCE = 0.6
_PRIOR_WEIGHT = 4.0  # proposals that the first guess counts for
_SEQUENCE_WEIGHT = 24.0  # proposals that its class counts for against a sequence's own
_MEMORY = 400.0  # proposals after which a class has forgotten 63 % of what came before


class Acceptance:
    """How often each model's proposals are accepted by one target; old ones are forgotten."""

    def __init__(self, num_models: int) -> None:
        self._accepted = [0.0] * num_models
        self._verified = [0.0] * num_models

    def add(self, model: int, accepted: float, verified: float = 1.0) -> None:
        kept = math.exp(-verified / _MEMORY)
        self._accepted[model] = self._accepted[model] * kept + accepted
        self._verified[model] = self._verified[model] * kept + verified

    def forget(self, model: int, share: float) -> None:
        """Weigh what was seen of a model so far by 1 - share."""
        self._accepted[model] *= 1 - share
        self._verified[model] *= 1 - share

    def rate(self, model: int) -> float:
        return (self._accepted[model] + _PRIOR_WEIGHT * _PRIOR_ACCEPTANCE) / (
            self._verified[model] + _PRIOR_WEIGHT
        )

    def rate_of(self, sequence: Sequence, model: int) -> float:
        """Of one sequence, drawn towards that of all while it is young."""
        verified = sequence.stats.verified[model]
        weight = _SEQUENCE_WEIGHT
        return (sequence.stats.accepted[model] + weight * self.rate(model)) / (verified + weight)

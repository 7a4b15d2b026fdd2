"""How often what each model proposes is accepted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence as Row

from server.core.combination import Combination
from server.core.sequence import Sequence
from server.engine.bounded import make_room
from server.engine.kind import Kind, kind_of

_PRIOR_ACCEPTANCE = 0.6
_PRIOR_WEIGHT = 4.0  # proposals that the first guess counts for
_SEQUENCE_WEIGHT = 24.0  # proposals that its class counts for against a sequence's own
_MEMORY = 400.0  # proposals after which a class has forgotten 63 % of what came before
_KEPT = math.exp(-1 / _MEMORY)  # of that, after one
_UNTESTED = 120.0  # seconds of decoding after which 63 % of what nothing tests is forgotten


class Acceptance:
    """How often each model's proposals are accepted by one target; old ones are forgotten."""

    def __init__(self, num_models: int) -> None:
        self._accepted = [0.0] * num_models
        self._verified = [0.0] * num_models

    def add(self, model: int, accepted: float) -> None:
        self._accepted[model] = self._accepted[model] * _KEPT + accepted
        self._verified[model] = self._verified[model] * _KEPT + 1.0

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


class AcceptanceRates:
    """Acceptance by target and kind of sequence."""

    def __init__(self) -> None:
        self._known: dict[tuple[Combination, Kind], Acceptance] = {}

    def add(self, sequence: Sequence, model: int, accepted: float) -> None:
        """A proposal of `model` was verified, or would have been, with this probability."""
        self._of(sequence).add(model, accepted)

    def fade(self, sequence: Sequence, models: Iterable[int], seconds: float) -> None:
        """Nothing has tested proposals of `models` for so many seconds of decoding.

        A bad spell of them would otherwise be remembered for good.
        """
        acceptance = self._of(sequence)
        for model in models:
            acceptance.forget(model, -math.expm1(-seconds / _UNTESTED))

    def mean(self, members: Row[Sequence]) -> tuple[float, ...]:
        """[num_models], over sequences of the same target and kind."""
        acceptance = self._of(members[0])
        return tuple(
            sum(acceptance.rate_of(sequence, model) for sequence in members) / len(members)
            for model in range(members[0].num_models)
        )

    def _of(self, sequence: Sequence) -> Acceptance:
        key = (sequence.decoding.combination, kind_of(sequence))
        if key not in self._known:
            make_room(self._known)
            self._known[key] = Acceptance(sequence.num_models)
        return self._known[key]

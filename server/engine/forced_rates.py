"""How often grammars leave no choice about tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from server.core.stats import Delivery
from server.engine.kind import Kind

_PRIOR = 8.0  # chosen tokens that the first guess, of no forced ones, counts for
_MEMORY = 400.0  # chosen tokens after which a kind has forgotten 63 % of what came before


@dataclass(slots=True)
class _Counts:
    """Of tokens and runs of one kind; old ones are forgotten."""

    chosen: float = 0.0
    forced: float = 0.0
    runs: float = 0.0

    def add(self, chosen: int, forced: int) -> None:
        kept = math.exp(-chosen / _MEMORY)
        self.chosen = self.chosen * kept + chosen
        self.forced = self.forced * kept + forced
        # What goes on from step to step begins once.
        self.runs = self.runs * kept + (chosen > 0 and forced > 0)


class ForcedRates:
    """Forced tokens by kind of sequence. A text's own past says little: forms differ by place."""

    def __init__(self) -> None:
        self._known: defaultdict[Kind, _Counts] = defaultdict(_Counts)

    def add(self, kind: Kind, delivery: Delivery) -> None:
        """A sequence of `kind` got these tokens."""
        if kind.has_grammar:
            num_chosen = delivery.num_tokens - delivery.num_forced
            self._known[kind].add(num_chosen, delivery.num_forced)

    def of(self, kind: Kind) -> tuple[float, float]:
        """`runs` and `forced` of `Rates`."""
        if not kind.has_grammar:
            return 0.0, 0.0
        counts = self._known[kind]
        weight = counts.chosen + _PRIOR
        return counts.runs / weight, counts.forced / weight

"""When what prompt lookup has found is worth scoring.

All scorers score n looked-up tokens at once, and what follows the last one is drawn. If each is
right with probability a where those before it were, that gives 1 + a + ... + a**n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass

from server.engine.cost_table import CostTable


@dataclass(frozen=True, slots=True)
class LookupCosts:
    """Seconds, with as many sequences as decode now.

    Attributes:
        token_seconds: of a verified token of one sequence without lookup.
        cycle_seconds: [max_tokens] of one sequence's share of scoring so many tokens.
    """

    token_seconds: float
    cycle_seconds: tuple[float, ...]

    @classmethod
    def at(
        cls,
        costs: CostTable,
        scorers: Row[int],
        batch: int,
        max_tokens: int,
        token_seconds: float,
    ) -> LookupCosts:
        """By the table, `batch` sequences decoding."""
        seconds = [_cycle_seconds(costs, scorers, batch, n) for n in range(1, max_tokens + 1)]
        return cls(token_seconds, tuple(each / batch for each in seconds))

    def best_length(self, rate: float, num_found: int) -> int:
        """How many of `num_found` tokens to score; 0 where decoding without them is as fast."""
        best, fastest = 0, self.token_seconds
        expected, chance = 1.0, 1.0
        for length, seconds in enumerate(self.cycle_seconds[:num_found], start=1):
            chance *= rate
            expected += chance
            if seconds / expected < fastest:
                best, fastest = length, seconds / expected
        return best


def _cycle_seconds(costs: CostTable, scorers: Row[int], batch: int, num_tokens: int) -> float:
    """`num_tokens` of each of `batch` sequences are scored, and one more is drawn."""
    forwards = sum(costs.forward_seconds(model, batch, num_tokens + 1) for model in scorers)
    feeds = (len(scorers) - 1) * costs.rest_seconds(batch)
    verified = num_tokens * batch
    return forwards + feeds + costs.rest_seconds(batch, num_drawn=batch, num_verified=verified)

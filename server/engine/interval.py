"""What the steps between two choices gave, and what they took."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.core.lookup import LOOKUP
from server.core.stats import StepStats
from server.engine.cost_table import CostTable


@dataclass(slots=True)
class Interval:
    """Steps since the last choice.

    Attributes:
        begun_at: seconds of decoding.
        is_pure: all sequences have decoded by one choice for some steps; before, nothing is counted
            but steps and what was looked up.
        num_steps: all of them.
        num_looked_up: tokens that prompt lookup proposed or that were decided of it.
        seconds: that the cost table expects of these very steps, on a machine as fast as at first.
        num_tokens: decoded, by how many sequences were decoding.
    """

    begun_at: float = 0.0
    is_pure: bool = False
    num_steps: int = 0
    num_looked_up: int = 0
    seconds: float = 0.0
    num_tokens: dict[int, int] = field(default_factory=dict)

    @property
    def total_tokens(self) -> int:
        return sum(self.num_tokens.values())

    @property
    def main_batch(self) -> int:
        """How many sequences were decoding for most of the tokens, of which there are some."""
        return max(self.num_tokens, key=lambda batch: self.num_tokens[batch])

    def add(self, stats: StepStats, batch: int, costs: CostTable) -> None:
        """One step more, while `batch` sequences are decoding."""
        self.num_steps += 1
        # Proposed, or decided, which for the last ones of an interval is left to the next.
        decided = sum(proposer == LOOKUP for proposer, _, _ in stats.verified_by_offset)
        self.num_looked_up += stats.num_looked_up + decided
        if self.is_pure:
            self.seconds += costs.price(stats) / costs.slowness
            count = sum(delivery.num_decoded for delivery in stats.deliveries)
            self.num_tokens[batch] = self.num_tokens.get(batch, 0) + count

    def go_on_from(self, before: Interval) -> None:
        """Count the tokens and seconds of the interval before this one, which has none, as its."""
        self.seconds = before.seconds
        self.num_tokens = before.num_tokens

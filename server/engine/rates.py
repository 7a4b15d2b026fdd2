"""What predictions need to know of texts."""

from __future__ import annotations

from dataclasses import dataclass

BUCKETS = 25  # rates are rounded to 1/25, so that profiles can be kept


@dataclass(frozen=True, slots=True)
class Rates:
    """Of texts that are decoded alike.

    Attributes:
        acceptance: [num_models] how often what each model proposes is accepted.
        runs: how often forced tokens follow one that is not forced; see `engine.forcing`.
        forced: forced tokens for each that is not, at least `runs`.
    """

    acceptance: tuple[float, ...]
    runs: float = 0.0
    forced: float = 0.0

    def differs_from(self, other: Rates) -> bool:
        """By as much as makes another profile, anywhere."""
        pairs = zip(self._all, other._all, strict=True)
        return any(abs(rate - before) >= 1 / BUCKETS for rate, before in pairs)

    @property
    def _all(self) -> tuple[float, ...]:
        return (*self.acceptance, self.runs, self.forced)

"""What the server itself counted and estimated while a block ran, from its /metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import httpx

from server.scrape import Scrape, parse_metrics

_BASELINE = "cos_baseline_estimated_seconds_total"
_DECODE = "cos_decode_seconds_total"
_VERIFIED = "cos_spec_verified_tokens_per_position_total"
_ACCEPTED = "cos_spec_accepted_tokens_per_position_total"

ByPosition = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Reading:
    """Sums since the server's start, or between two moments.

    Attributes:
        baseline_seconds, decode_seconds: both sides of the estimated speedup, of the engine.
        verified, accepted: of each proposer, proposals that were verified and accepted, by their
            place in the window.
    """

    baseline_seconds: float
    decode_seconds: float
    verified: ByPosition = field(default_factory=dict)
    accepted: ByPosition = field(default_factory=dict)

    def since(self, before: Reading) -> Reading:
        return Reading(
            self.baseline_seconds - before.baseline_seconds,
            self.decode_seconds - before.decode_seconds,
            _difference(self.verified, before.verified),
            _difference(self.accepted, before.accepted),
        )


def _difference(after: ByPosition, before: ByPosition) -> ByPosition:
    return {
        name: [a - b for a, b in zip(counts, before.get(name, [0] * len(counts)), strict=True)]
        for name, counts in after.items()
    }


async def take_reading(http: httpx.AsyncClient) -> Reading | None:
    """Since the server's start; None where it shows no such metrics here."""
    try:
        response = await http.get("/metrics")
        response.raise_for_status()
    except httpx.HTTPError:
        return None
    scrape = parse_metrics(response.text, time.monotonic())
    if _BASELINE not in scrape or _DECODE not in scrape:
        return None
    return Reading(
        scrape.total(_BASELINE),
        scrape.total(_DECODE),
        _by_position(scrape, _VERIFIED),
        _by_position(scrape, _ACCEPTED),
    )


def _by_position(scrape: Scrape, name: str) -> ByPosition:
    positions = sorted(scrape.values(name, "position"), key=int)
    return {
        proposer: [int(scrape.total(name, proposer=proposer, position=p)) for p in positions]
        for proposer in scrape.values(name, "proposer")
    }

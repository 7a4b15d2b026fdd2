"""What the server itself estimated while a block ran, from its /metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass

import httpx

from server.scrape import parse_metrics

_BASELINE = "cos_baseline_estimated_seconds_total"
_DECODE = "cos_decode_seconds_total"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Both sides of the estimated speedup, in seconds of the engine."""

    baseline_seconds: float
    decode_seconds: float

    def since(self, before: Estimate) -> Estimate:
        return Estimate(
            self.baseline_seconds - before.baseline_seconds,
            self.decode_seconds - before.decode_seconds,
        )


async def read_estimate(http: httpx.AsyncClient) -> Estimate | None:
    """Since the server's start; None where it shows no such metrics here."""
    try:
        response = await http.get("/metrics")
        response.raise_for_status()
    except httpx.HTTPError:
        return None
    scrape = parse_metrics(response.text, time.monotonic())
    if _BASELINE not in scrape or _DECODE not in scrape:
        return None
    return Estimate(scrape.total(_BASELINE), scrape.total(_DECODE))

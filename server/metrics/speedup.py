"""Both sides of the estimated speedup, and of the measured; ratios are left to PromQL."""

from __future__ import annotations

from functools import partial
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from server.core.stats import ShadowOutcome, ShadowStats, StepStats
from server.engine.cost_table import CostTable


class _Shadow:
    """Standard decoding as measured on the live load."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cos_shadow_{name}", text, labels, registry=registry)

        self._standard_seconds = counter(
            "standard_seconds", "Time of rounds of standard decoding that were measured."
        )
        self._standard_tokens = counter("standard_tokens", "Tokens of these rounds.")
        self._baseline_seconds = counter(
            "baseline_seconds",
            "What standard decoding of the tokens decoded between measurements would have taken, "
            "at what a token took when as many sequences last decoded so.",
        )
        self._decode_seconds = counter(
            "decode_seconds", "What decoding of the same tokens took, waste included."
        )
        self._windows = counter("windows", "Measurements, by what became of them.", "outcome")
        for outcome in get_args(ShadowOutcome):
            self._windows.labels(outcome)

    def observe(self, stats: ShadowStats) -> None:
        self._standard_seconds.inc(stats.standard_seconds)
        self._standard_tokens.inc(stats.standard_tokens)
        self._baseline_seconds.inc(stats.baseline_seconds)
        self._decode_seconds.inc(stats.decode_seconds)
        if stats.outcome is not None:
            self._windows.labels(stats.outcome).inc()


class SpeedupMetrics:
    """Seconds that decoding took, and that standard decoding of the same tokens would have."""

    def __init__(self, registry: CollectorRegistry, names: tuple[str, ...]) -> None:
        self.decode_seconds = Counter(
            "cos_decode_seconds",
            "Wall time of engine steps spent decoding, waste included; a step that also reads "
            "prompts counts by what decoding alone would have taken, or by its share of decoding "
            "tokens where nothing was timed at start.",
            registry=registry,
        )
        self.baseline_seconds: Counter | None = None
        self._shadow: _Shadow | None = None
        self._registry = registry
        self._names = names

    def observe(self, stats: StepStats) -> None:
        self.decode_seconds.inc(stats.decode_seconds)
        if self.baseline_seconds is not None and stats.baseline_seconds is not None:
            self.baseline_seconds.inc(stats.baseline_seconds)
        if self._shadow is not None and stats.shadow is not None:
            self._shadow.observe(stats.shadow)

    def shadowed(self) -> None:
        """Export what windows of standard decoding measure; there are no such series without."""
        self._shadow = _Shadow(self._registry)

    def calibrated(self, costs: CostTable) -> None:
        """Export what was timed; without it there are no such series, rather than ones of 1."""
        self.baseline_seconds = Counter(
            "cos_baseline_estimated_seconds",
            "Estimated time of standard decoding for the same tokens, without the first of each "
            "text, which comes with the prompt.",
            registry=self._registry,
        )
        forward = Gauge(
            "cos_baseline_step_seconds",
            "Forward of one token of each of `batch` sequences, timed at start.",
            ("model", "batch"),
            registry=self._registry,
        )
        rest = Gauge(
            "cos_baseline_rest_seconds",
            "Everything else of a round of standard decoding: combining, drawing, text.",
            ("batch",),
            registry=self._registry,
        )
        load = Gauge(
            "cos_model_load",
            "Seconds that the model's forwards take now, over those timed at start for the same "
            "shapes; both sides of the estimated speedup follow it.",
            ("model",),
            registry=self._registry,
        )
        timings = costs.timings
        for index, batch in enumerate(timings.batches):
            rest.labels(str(batch)).set(timings.rest_seconds[index])
            for name, seconds in zip(self._names, timings.forward_seconds, strict=True):
                forward.labels(name, str(batch)).set(seconds[index])
        for model, name in enumerate(self._names):
            load.labels(name).set_function(partial(costs.load, model))

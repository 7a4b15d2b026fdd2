"""Steps, forwards and memory of the engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.config import StrategyName
from server.core.combination import Method
from server.core.stats import Phase, StepStats
from server.metrics.buckets import SIZES, TOKEN_SECONDS

PHASES: tuple[Phase, ...] = get_args(Phase)
METHODS: tuple[Method, ...] = get_args(Method)
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)


class EngineMetrics:
    """Steps, forwards and memory."""

    def __init__(self, registry: CollectorRegistry, names: tuple[str, ...]) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.generated = counter(
            "cos_generated_tokens",
            "Tokens that belong to clients' texts, stop tokens included.",
            "method",
            "strategy",
        )
        phases = "a forward counts as what most of it was for: prefill, propose or score"
        self.forwards = counter(
            "cos_model_forward_passes", f"Forwards; {phases}.", "model", "phase"
        )
        self.forward_seconds = counter(
            "cos_model_forward_seconds", f"Time in forwards; {phases}.", "model", "phase"
        )
        self.forward_tokens = counter(
            "cos_model_forward_tokens",
            "Tokens fed to a model; prefill is prompts and what a preemption lost.",
            "model",
            "phase",
        )
        self.sequence_forwards = counter(
            "cos_model_sequence_forwards",
            "Forwards of a model times the sequences that each of them decoded.",
            "model",
        )
        self.preemptions = counter(
            "cos_preemptions", "Sequences that lost their pages to older ones."
        )
        self.step_seconds = Histogram(
            "cos_engine_step_seconds",
            "One advance of one model, everything included.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "cos_batch_size", "Sequences in a step.", buckets=SIZES, registry=registry
        )
        for method in METHODS:
            for strategy in STRATEGIES:
                self.generated.labels(method, strategy)
        self._registry = registry
        self._names = names
        for name in names:
            self.sequence_forwards.labels(name)
            for forward_phase in PHASES:
                self.forwards.labels(name, forward_phase)
                self.forward_seconds.labels(name, forward_phase)
            for phase in ("prefill", "decode"):
                self.forward_tokens.labels(name, phase)

    def observe(self, stats: StepStats) -> None:
        name = self._names[stats.model]
        num_decode_tokens = stats.num_tokens - stats.num_prefill_tokens
        self.forwards.labels(name, stats.phase).inc()
        self.sequence_forwards.labels(name).inc(stats.num_decoding)
        self.forward_seconds.labels(name, stats.phase).inc(stats.forward_seconds)
        self.forward_tokens.labels(name, "prefill").inc(stats.num_prefill_tokens)
        self.forward_tokens.labels(name, "decode").inc(num_decode_tokens)
        self.step_seconds.observe(stats.step_seconds)
        self.batch_size.observe(stats.num_sequences)
        for (method, strategy), count in _num_generated(stats).items():
            self.generated.labels(method, strategy).inc(count)
        self.preemptions.inc(stats.num_preempted)

    def watch_phase(self, read: Callable[[], str]) -> None:
        """Export whether requests are taken; called once for each app."""
        for phase, text in (
            ("ready", "1 while requests are taken."),
            ("draining", "1 while requests are refused and running ones finish."),
        ):
            gauge = Gauge(f"cos_{phase}", text, registry=self._registry)
            gauge.set_function(partial(_is, read, phase))

    def watch(self, num_running: Callable[[], int], num_waiting: Callable[[], int]) -> None:
        """Export the queue as it is when somebody looks; called once, when the engine is there."""
        for state, read in (("running", num_running), ("waiting", num_waiting)):
            gauge = Gauge(
                f"cos_sequences_{state}",
                f"Sequences {state} in the engine.",
                registry=self._registry,
            )
            gauge.set_function(read)

    def watch_pages(
        self,
        used: Callable[[], tuple[int, ...]],
        limits: tuple[int, ...],
        page_bytes: tuple[int, ...],
    ) -> None:
        """Export KV memory, [num_models] each; called once, when the engine is there."""
        in_use = Gauge(
            "cos_kv_pages_used", "KV pages in use, by model.", ("model",), registry=self._registry
        )
        limit = Gauge(
            "cos_kv_pages", "KV pages there are, by model.", ("model",), registry=self._registry
        )
        size = Gauge(
            "cos_kv_page_bytes", "Memory of one KV page.", ("model",), registry=self._registry
        )
        for k, name in enumerate(self._names):
            in_use.labels(name).set_function(partial(_entry, used, k))
            limit.labels(name).set(limits[k])
            size.labels(name).set(page_bytes[k])


def _num_generated(stats: StepStats) -> dict[tuple[str, str], int]:
    """By method and strategy."""
    counts: dict[tuple[str, str], int] = {}
    for delivery in stats.deliveries:
        decoding = delivery.decoding
        key = (decoding.combination.method, decoding.strategy)
        counts[key] = counts.get(key, 0) + delivery.num_tokens
    return counts


def _is(read: Callable[[], str], phase: str) -> bool:
    return read() == phase


def _entry(read: Callable[[], tuple[int, ...]], index: int) -> float:
    return read()[index]

"""Steps, forwards and memory of the engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.core.stats import StepStats
from server.metrics.buckets import SIZES, TOKEN_SECONDS


class EngineMetrics:
    """Steps, forwards and memory."""

    def __init__(self, registry: CollectorRegistry, names: tuple[str, ...]) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.generated = counter(
            "cos_generated_tokens", "Tokens that belong to clients' texts, stop tokens included."
        )
        self.forwards = counter("cos_model_forward_passes", "Forwards, by model.", "model")
        self.forward_seconds = counter(
            "cos_model_forward_seconds", "Time in forwards, by model.", "model"
        )
        self.forward_tokens = counter(
            "cos_model_forward_tokens",
            "Tokens fed to a model; prefill is prompts and what a preemption lost.",
            "model",
            "phase",
        )
        self.decode_seconds = counter(
            "cos_decode_seconds",
            "Wall time of engine steps spent decoding; a step that also reads prompts counts by "
            "its share of decoding tokens.",
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
        self._registry = registry
        self._names = names
        for name in names:
            self.forwards.labels(name)
            self.forward_seconds.labels(name)
            for phase in ("prefill", "decode"):
                self.forward_tokens.labels(name, phase)

    def observe(self, stats: StepStats) -> None:
        name = self._names[stats.model]
        num_decode_tokens = stats.num_tokens - stats.num_prefill_tokens
        self.forwards.labels(name).inc()
        self.forward_seconds.labels(name).inc(stats.forward_seconds)
        self.forward_tokens.labels(name, "prefill").inc(stats.num_prefill_tokens)
        self.forward_tokens.labels(name, "decode").inc(num_decode_tokens)
        self.decode_seconds.inc(stats.step_seconds * num_decode_tokens / max(1, stats.num_tokens))
        self.step_seconds.observe(stats.step_seconds)
        self.batch_size.observe(stats.num_sequences)
        self.generated.inc(stats.num_generated)
        self.preemptions.inc(stats.num_preempted)

    def watch(self, num_running: Callable[[], int], num_waiting: Callable[[], int]) -> None:
        """Export the queue as it is when somebody looks; called once, when the engine is there."""
        for state, read in (("running", num_running), ("waiting", num_waiting)):
            gauge = Gauge(
                f"cos_sequences_{state}",
                f"Sequences {state} in the engine.",
                registry=self._registry,
            )
            gauge.set_function(read)

    def watch_pages(self, used: Callable[[], tuple[int, ...]], limits: tuple[int, ...]) -> None:
        """Export KV memory, [num_models] pages each; called once, when the engine is there."""
        in_use = Gauge(
            "cos_kv_pages_used", "KV pages in use, by model.", ("model",), registry=self._registry
        )
        limit = Gauge(
            "cos_kv_pages", "KV pages there are, by model.", ("model",), registry=self._registry
        )
        for k, name in enumerate(self._names):
            in_use.labels(name).set_function(partial(_entry, used, k))
            limit.labels(name).set(limits[k])


def _entry(read: Callable[[], tuple[int, ...]], index: int) -> float:
    return read()[index]

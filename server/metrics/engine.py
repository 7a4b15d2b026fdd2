"""Steps, forwards and memory of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence as Row
from dataclasses import dataclass
from functools import partial
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from server.config import StrategyName
from server.core.combination import Method
from server.core.stats import Fault, Phase, StepStats
from server.metrics.buckets import SIZES, TOKEN_SECONDS

PHASES: tuple[Phase, ...] = get_args(Phase)
METHODS: tuple[Method, ...] = get_args(Method)
FAULTS: tuple[Fault, ...] = get_args(Fault)
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model once it is loaded.

    Attributes:
        device, dtype: where it runs, and its type of numbers.
        weight_bytes: memory of its weights.
        num_pages, page_bytes: of its KV memory, pages that sequences can hold.
    """

    device: str
    dtype: str
    weight_bytes: int
    num_pages: int
    page_bytes: int


class _IdleSeconds(Collector):
    """A counter that is right in the middle of a wait too."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        text = "Time that the engine has waited for work."
        yield CounterMetricFamily("cos_engine_idle_seconds", text, value=self._read())


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
        self.combine_seconds = counter(
            "cos_combine_seconds",
            "Time of engine steps between a forward and the decisions it allows: warping, "
            "combining, verifying, drawing, proposing.",
        )
        self.overlapping_steps = counter(
            "cos_overlapping_steps",
            "Engine steps beside which others ran on another device, over the other half of the "
            "sequences.",
        )
        self.cached_tokens = counter(
            "cos_prefix_cache_hit_tokens",
            "Tokens whose keys and values were found in the prefix cache instead of computed.",
            "model",
        )
        self.preemptions = counter(
            "cos_preemptions",
            "Sequences that lost their pages to older ones.",
        )
        self.faults = counter(
            "cos_engine_faults",
            "Faults that the engine survived: sequences that ended because of one, and steps that "
            "did not fit into memory and were made smaller.",
            "kind",
        )
        for kind in FAULTS:
            self.faults.labels(kind)
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
            self.cached_tokens.labels(name)
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
        if stats.num_prefill_tokens:
            self.forward_tokens.labels(name, "prefill").inc(stats.num_prefill_tokens)
        self.forward_tokens.labels(name, "decode").inc(num_decode_tokens)
        self.step_seconds.observe(stats.step_seconds)
        self.combine_seconds.inc(stats.combine_seconds)
        self.overlapping_steps.inc(stats.overlaps)
        self.batch_size.observe(stats.num_sequences)
        for (method, strategy), count in _num_generated(stats).items():
            self.generated.labels(method, strategy).inc(count)
        self.preemptions.inc(stats.num_preempted)
        for cached_by, count in zip(self._names, stats.num_cached, strict=False):
            if count:
                self.cached_tokens.labels(cached_by).inc(count)

    def observe_fault(self, fault: Fault) -> None:
        self.faults.labels(fault).inc()

    def watch_phase(self, read: Callable[[], str]) -> None:
        """Export whether requests are taken; called once for each app."""
        for phase, text in (
            ("ready", "1 while requests are taken."),
            ("draining", "1 while requests are refused and running ones finish."),
        ):
            gauge = Gauge(f"cos_{phase}", text, registry=self._registry)
            gauge.set_function(partial(_is, read, phase))

    def watch(
        self,
        num_running: Callable[[], int],
        num_waiting: Callable[[], int],
        idle_seconds: Callable[[], float],
    ) -> None:
        """Export the queue as it is when somebody looks; called once, when the engine is there."""
        self._registry.register(_IdleSeconds(idle_seconds))
        for state, read in (("running", num_running), ("waiting", num_waiting)):
            gauge = Gauge(
                f"cos_sequences_{state}",
                f"Sequences {state} in the engine.",
                registry=self._registry,
            )
            gauge.set_function(read)

    def watch_models(
        self,
        pages_used: Callable[[], tuple[int, ...]],
        pages_idle: Callable[[], tuple[int, ...]],
        models: Row[ModelFacts],
    ) -> None:
        """Export the models and their memory; called once, when they are loaded.

        Args:
            pages_used: of the KV memory, [num_models].
            pages_idle: that keep a prefix for nobody yet, [num_models].
            models: [num_models].
        """

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ("model",), registry=self._registry)

        in_use = gauge("cos_kv_pages_used", "KV pages in use.")
        idle = gauge("cos_kv_pages_idle", "KV pages that only keep a prefix until it is wanted.")
        limit = gauge("cos_kv_pages", "KV pages there are.")
        bytes_in_use = gauge("cos_kv_used_bytes", "KV memory in use.")
        bytes_limit = gauge("cos_kv_limit_bytes", "KV memory there is.")
        weights = gauge("cos_model_weight_bytes", "Memory of the model's weights.")
        facts = Info("cos_model", "A model and where it runs.", ("model",), registry=self._registry)
        for k, (name, model) in enumerate(zip(self._names, models, strict=True)):
            in_use.labels(name).set_function(partial(_entry, pages_used, k))
            idle.labels(name).set_function(partial(_entry, pages_idle, k))
            limit.labels(name).set(model.num_pages)
            bytes_in_use.labels(name).set_function(partial(_entry, pages_used, k, model.page_bytes))
            bytes_limit.labels(name).set(model.num_pages * model.page_bytes)
            weights.labels(name).set(model.weight_bytes)
            facts.labels(name).info({"device": model.device, "dtype": model.dtype})


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


def _entry(read: Callable[[], tuple[int, ...]], index: int, factor: int = 1) -> float:
    return read()[index] * factor

"""Prometheus metrics, and the only importer of prometheus_client.

Base units, `_total` on counters, ratios left to PromQL, every label bounded by the configuration,
known label sets present from the start. `observe_step` runs on the engine thread, everything else
on the event loop's; prometheus_client's own locks make that safe.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections import Counter as Tally
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from types import TracebackType

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    generate_latest,
)

from server import __version__
from server.config import ServerConfig
from server.core.stats import StepStats
from server.errors import EngineDraining, EngineOverloaded

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
ENDPOINTS = ("completions",)
FINISH_REASONS = ("stop", "length", "cancelled", "error")
REJECTIONS = (
    "validation",
    "unsupported_parameter",
    "model_not_found",
    "context_length_exceeded",
    "too_large",
    "queue_full",
    "unavailable",
)
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """All series of one app, in a registry of its own."""

    def __init__(self, config: ServerConfig, registry: CollectorRegistry | None = None) -> None:
        names = tuple(model.name for model in config.models)
        self.registry = registry = registry or CollectorRegistry()
        self.http = HttpMetrics(registry)
        self.requests = RequestMetrics(registry)
        self.speculation = SpeculationMetrics(registry, names, config.decoding.max_gamma)
        self.engine = EngineMetrics(registry, names)
        _describe(registry, config)

    def observe_step(self, stats: StepStats) -> None:
        """Count one engine step."""
        self.speculation.observe(stats)
        self.engine.observe(stats)

    def request(self, endpoint: str, num_prompt_tokens: int) -> RequestObserver:
        """A context that watches one accepted request."""
        return RequestObserver(self.requests, endpoint, num_prompt_tokens)

    def reject(self, reason: str) -> None:
        """Count a request that was refused before any work; `reason` is one of REJECTIONS."""
        self.requests.rejected.labels(reason).inc()

    def render(self) -> bytes:
        """The text format, of type CONTENT_TYPE."""
        return generate_latest(self.registry)


class HttpMetrics:
    """Every HTTP request, whatever became of it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "cos_http_requests",
            "HTTP requests by route template, method and status.",
            ("route", "method", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "cos_http_request_duration_seconds",
            "From the request's head to the response's last byte.",
            ("route", "method"),
            buckets=_SECONDS,
            registry=registry,
        )

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """`route` is a template: a raw path would be an unbounded label."""
        method = method if method in _METHODS else "other"
        self.requests.labels(route, method, str(status)).inc()
        self.seconds.labels(route, method).observe(seconds)


class RequestMetrics:
    """Requests for text, from acceptance to their last token."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        self.finished = Counter(
            "cos_requests_finished",
            "Accepted requests that ended; length if any choice reached its token limit.",
            ("endpoint", "reason"),
            registry=registry,
        )
        self.rejected = Counter(
            "cos_requests_rejected",
            "Requests refused before any work.",
            ("reason",),
            registry=registry,
        )
        self.running = Gauge(
            "cos_requests_running", "Requests that have got a token.", registry=registry
        )
        self.waiting = Gauge(
            "cos_requests_waiting",
            "Accepted requests without a token yet: queued, or reading their prompt.",
            registry=registry,
        )
        self.total_prompt_tokens = Counter(
            "cos_prompt_tokens", "Prompt tokens of requests that got a token.", registry=registry
        )
        self.first_token = histogram(
            "cos_time_to_first_token_seconds",
            "From acceptance to the first token of any choice.",
            _SECONDS,
        )
        self.inter_token = histogram(
            "cos_inter_token_seconds",
            "Time between tokens of a choice: n tokens that come together after dt count as n "
            "observations of dt / n.",
            _TOKEN_SECONDS,
        )
        self.duration = histogram(
            "cos_request_duration_seconds", "From acceptance to the end.", _SECONDS
        )
        self.prompt_tokens = histogram(
            "cos_request_prompt_tokens", "Tokens of all prompts of a request.", _TOKENS
        )
        self.generation_tokens = histogram(
            "cos_request_generation_tokens", "Tokens of all choices of a request.", _TOKENS
        )
        for endpoint in ENDPOINTS:
            for reason in FINISH_REASONS:
                self.finished.labels(endpoint, reason)
        for reason in REJECTIONS:
            self.rejected.labels(reason)


class SpeculationMetrics:
    """Proposals and what became of them; bonus tokens count as proposals of their model."""

    def __init__(self, registry: CollectorRegistry, names: tuple[str, ...], max_gamma: int) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        position = "place in the pending tail, 0-based"
        self.proposed = counter(
            "cos_spec_draft_tokens", "Tokens proposed, bonus tokens included.", "proposer"
        )
        self.accepted = counter(
            "cos_spec_accepted_tokens", "Proposed tokens that were accepted.", "proposer"
        )
        self.verified_at = counter(
            "cos_spec_verified_tokens_per_position",
            f"Proposed tokens that were verified, by {position}: the denominator of acceptance "
            "there. Those behind a rejection never are.",
            "proposer",
            "position",
        )
        self.accepted_at = counter(
            "cos_spec_accepted_tokens_per_position",
            f"Proposed tokens that were accepted, by {position}.",
            "proposer",
            "position",
        )
        self.bonus = counter(
            "cos_spec_bonus_tokens",
            "Tokens a model proposed right after scoring proposals of others.",
            "model",
        )
        self.recovered = counter("cos_spec_recovered_tokens", "Tokens taken after a rejection.")
        self.drawn = counter("cos_spec_drawn_tokens", "Tokens taken with nothing proposed.")
        self.discarded = counter(
            "cos_spec_discarded_tokens", "Verified tokens cut off by the end of the text."
        )
        self._names = names
        # The longest tail: a whole proposal, and a bonus of every other model.
        self._positions = [str(i) for i in range(max_gamma + len(names))]
        for name in names:
            for family in (self.proposed, self.accepted, self.bonus):
                family.labels(name)
            for index in self._positions:
                self.verified_at.labels(name, index)
                self.accepted_at.labels(name, index)

    def observe(self, stats: StepStats) -> None:
        name = self._names[stats.model]
        self.proposed.labels(name).inc(stats.num_proposed)
        self.bonus.labels(name).inc(stats.num_bonus)
        for (proposer, offset, accepted), count in Tally(stats.verified_by_offset).items():
            index = self._positions[min(offset, len(self._positions) - 1)]
            self.verified_at.labels(self._names[proposer], index).inc(count)
            if accepted:
                self.accepted_at.labels(self._names[proposer], index).inc(count)
                self.accepted.labels(self._names[proposer]).inc(count)
        self.recovered.inc(stats.num_recovered)
        self.drawn.inc(stats.num_drawn)
        self.discarded.inc(stats.num_discarded)


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
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "cos_batch_size", "Sequences in a step.", buckets=_SIZES, registry=registry
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


class RequestObserver:
    """One accepted request, as a context: its end is counted whatever way it ends."""

    def __init__(self, metrics: RequestMetrics, endpoint: str, num_prompt_tokens: int) -> None:
        self.reason = "error"
        self.seconds = 0.0
        self._metrics = metrics
        self._endpoint = endpoint
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._started = time.perf_counter()
        self._last: dict[int, float] = {}  # when each choice last got tokens

    def __enter__(self) -> RequestObserver:
        self._metrics.waiting.inc()
        return self

    def tokens(self, choice: int, count: int) -> None:
        """`count` tokens of a choice have come."""
        if count == 0:
            return
        now = time.perf_counter()
        if not self._last:
            self._start(now)
        if choice in self._last:
            each = (now - self._last[choice]) / count
            for _ in range(count):
                self._metrics.inter_token.observe(each)
        self._last[choice] = now
        self._num_tokens += count

    def finish(self, reason: str) -> None:
        """The request is complete; `reason` is "stop" or "length"."""
        self.reason = reason

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        (self._metrics.running if self._last else self._metrics.waiting).dec()
        self.seconds = time.perf_counter() - self._started
        if isinstance(error, EngineOverloaded | EngineDraining) and not self._last:
            self.reason = "refused"  # counted where the answer is made
            return
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.reason = "cancelled"
        self._metrics.finished.labels(self._endpoint, self.reason).inc()
        self._metrics.duration.observe(self.seconds)
        self._metrics.generation_tokens.observe(self._num_tokens)

    def _start(self, now: float) -> None:
        self._metrics.waiting.dec()
        self._metrics.running.inc()
        self._metrics.first_token.observe(now - self._started)
        self._metrics.prompt_tokens.observe(self._num_prompt_tokens)
        self._metrics.total_prompt_tokens.inc(self._num_prompt_tokens)


def _entry(read: Callable[[], tuple[int, ...]], index: int) -> float:
    return read()[index]


def _describe(registry: CollectorRegistry, config: ServerConfig) -> None:
    """What runs: versions and the configured decoding."""
    Info("cos_build", "Versions.", registry=registry).info(
        {
            "version": __version__,
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
    )
    Info("cos_engine", "The configured decoding.", registry=registry).info(
        {
            "served_model": config.served_model_name,
            "models": ",".join(model.name for model in config.models),
            "method": config.combination.method,
            "strategy": config.decoding.strategy,
            "gamma": str(config.decoding.gamma),
        }
    )
    started = Gauge("cos_start_time_seconds", "Unix time of the start.", registry=registry)
    started.set(time.time())

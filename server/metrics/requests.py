"""Requests for text, and who watches one of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as Row
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.core.sequence import SequenceStats
from server.errors import EngineDraining, EngineOverloaded, RequestTimeout
from server.metrics.buckets import SECONDS, TOKEN_SECONDS, TOKENS

ENDPOINTS = ("completions", "chat")
FINISH_REASONS = ("stop", "length", "cancelled", "timeout", "error")
REJECTIONS = (
    "validation",
    "unsupported_parameter",
    "model_not_found",
    "context_length_exceeded",
    "too_large",
    "too_slow",
    "invalid_api_key",
    "rate_limit",
    "queue_full",
    "unavailable",
)


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
            SECONDS,
        )
        self.queue = histogram(
            "cos_request_queue_seconds",
            "From acceptance until a model first ran over a prompt; requests that got a token.",
            SECONDS,
        )
        self.prefill = histogram(
            "cos_request_prefill_seconds",
            "From then to the first token; requests that got a token.",
            SECONDS,
        )
        self.decode = histogram(
            "cos_request_decode_seconds",
            "From the first token to the end; requests that got a token.",
            SECONDS,
        )
        self.inter_token = histogram(
            "cos_inter_token_seconds",
            "Time between tokens of a choice: n tokens that come together after dt count as n "
            "observations of dt / n.",
            TOKEN_SECONDS,
        )
        self.duration = histogram(
            "cos_request_duration_seconds", "From acceptance to the end.", SECONDS
        )
        self.prompt_tokens = histogram(
            "cos_request_prompt_tokens", "Tokens of all prompts of a request.", TOKENS
        )
        self.generation_tokens = histogram(
            "cos_request_generation_tokens", "Tokens of all choices of a request.", TOKENS
        )
        for endpoint in ENDPOINTS:
            for reason in FINISH_REASONS:
                self.finished.labels(endpoint, reason)
        for reason in REJECTIONS:
            self.rejected.labels(reason)


class RequestObserver:
    """One accepted request, as a context: its end is counted whatever way it ends."""

    def __init__(
        self,
        metrics: RequestMetrics,
        endpoint: str,
        num_prompt_tokens: int,
        stats: Row[SequenceStats] = (),
    ) -> None:
        self.reason = "error"
        self.ended = 0.0
        self.seconds = 0.0
        self.queue_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.endpoint = endpoint
        self._stats = stats
        self._metrics = metrics
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
        if not self._last:  # of the prompt alone
            self._count_prompt()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        (self._metrics.running if self._last else self._metrics.waiting).dec()
        self.ended = time.perf_counter()
        self.seconds = self.ended - self._started
        if isinstance(error, EngineOverloaded | EngineDraining) and not self._last:
            self.reason = "refused"  # counted where the answer is made
            return
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.reason = "cancelled"
        if isinstance(error, RequestTimeout):
            self.reason = "timeout"
        self._metrics.finished.labels(self.endpoint, self.reason).inc()
        self._metrics.duration.observe(self.seconds)
        if self.first_token_seconds is not None:
            self._metrics.decode.observe(self.seconds - self.first_token_seconds)
        self._metrics.generation_tokens.observe(self._num_tokens)

    def _start(self, now: float) -> None:
        self._metrics.waiting.dec()
        self._metrics.running.inc()
        self.first_token_seconds = now - self._started
        self._metrics.first_token.observe(self.first_token_seconds)
        runs = [each.first_run for each in self._stats if each.first_run is not None]
        if runs:
            self.queue_seconds = max(0.0, min(runs) - self._started)
            self._metrics.queue.observe(self.queue_seconds)
            self._metrics.prefill.observe(self.first_token_seconds - self.queue_seconds)
        self._count_prompt()

    def _count_prompt(self) -> None:
        self._metrics.prompt_tokens.observe(self._num_prompt_tokens)
        self._metrics.total_prompt_tokens.inc(self._num_prompt_tokens)

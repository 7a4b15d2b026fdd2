"""OpenTelemetry traces: one for each request, request -> queue -> prefill -> decode.

Spans are made when a request has ended, from moments that are measured anyway, so that decoding
pays nothing for them. A client's W3C `traceparent` becomes the parent. The library is an optional
extra `otel`, and imported only where tracing is configured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server import __version__
from server.config import TracingConfig
from server.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_OPERATIONS = {"completions": "text_completion", "chat": "chat"}

Attribute = str | int | float


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One request after its end.

    Attributes:
        endpoint: completions or chat.
        model: name that the client asked for.
        reason: why it ended; error makes its span one.
        ended: reading of time.perf_counter().
        seconds: from acceptance to the end.
        queue_seconds: until a model first ran over a prompt; None where none did, or no token came.
        first_token_seconds: until the first token; None where none came.
        attributes: whatever else the span shall carry.
    """

    endpoint: str
    model: str
    reason: str
    ended: float
    seconds: float
    queue_seconds: float | None
    first_token_seconds: float | None
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


class RequestTracer:
    """Turns finished requests into spans."""

    def __init__(self, provider: TracerProvider) -> None:
        """`provider` belongs to the tracer, which shuts it down."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("cos-server", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, request: FinishedRequest, headers: Mapping[str, str]) -> None:
        """One span for the request, and one inside it for each part that it came to.

        Args:
            request: what happened.
            headers: of the HTTP request, names in lower case.
        """
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        operation = _OPERATIONS.get(request.endpoint, request.endpoint)
        offset = time.time() - time.perf_counter()
        start = request.ended - request.seconds + offset
        span = self._tracer.start_span(
            f"{operation} {request.model}",
            self._propagator.extract(headers),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": request.model,
                "gen_ai.response.finish_reasons": [request.reason],
                **request.attributes,
            },
            start_time=_nanoseconds(start),
        )
        if request.reason == "error":
            span.set_status(StatusCode.ERROR)
        context = set_span_in_context(span)
        for name, begin, end in _parts(request):
            part = self._tracer.start_span(name, context, start_time=_nanoseconds(start + begin))
            part.end(_nanoseconds(start + end))
        span.end(_nanoseconds(start + request.seconds))

    def close(self) -> None:
        """Send what has not been sent; waits for the collector."""
        self._provider.shutdown()


def _parts(request: FinishedRequest) -> list[tuple[str, float, float]]:
    """(name, seconds from acceptance at its begin, at its end)."""
    queued, first = request.queue_seconds, request.first_token_seconds
    if queued is None or first is None:
        return []
    return [
        ("queue", 0.0, queued),
        ("prefill", queued, first),
        ("decode", first, request.seconds),
    ]


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def make_tracer(
    config: TracingConfig, exporter: SpanExporter | None = None
) -> RequestTracer | None:
    """None where no tracing is configured.

    Args:
        config: where spans go, and how many.
        exporter: takes them instead of the configured collector.

    Raises:
        ConfigError: the packages are not installed.
    """
    if config.endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint needs OpenTelemetry ({error}): pip install "
            "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        ) from error
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
        resource=Resource.create({"service.name": "cos-server", "service.version": __version__}),
    )
    chosen = exporter or OTLPSpanExporter(endpoint=config.endpoint)
    provider.add_span_processor(BatchSpanProcessor(chosen))
    return RequestTracer(provider)

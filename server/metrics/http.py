"""HTTP requests."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.metrics.buckets import SECONDS

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


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
            buckets=SECONDS,
            registry=registry,
        )

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """`route` is a template: a raw path would be an unbounded label."""
        method = method if method in _METHODS else "other"
        self.requests.labels(route, method, str(status)).inc()
        self.seconds.labels(route, method).observe(seconds)

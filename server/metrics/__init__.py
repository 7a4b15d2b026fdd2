"""Prometheus metrics, and the only importers of prometheus_client.

Base units, `_total` on counters, ratios left to PromQL, every label bounded by the configuration,
known label sets present from the start. `observe_step` runs on the engine thread, everything else
on the event loop's; prometheus_client's own locks make that safe.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence as Row
from importlib.metadata import version
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Gauge,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    start_http_server,
)

from server import __version__
from server.config import ServerConfig
from server.core.sequence import SequenceStats
from server.core.stats import StepStats
from server.metrics.engine import EngineMetrics, ModelFacts
from server.metrics.http import HttpMetrics
from server.metrics.requests import (
    ENDPOINTS,
    FINISH_REASONS,
    REJECTIONS,
    RequestMetrics,
    RequestObserver,
)
from server.metrics.speculation import SpeculationMetrics
from server.metrics.speedup import SpeedupMetrics

__all__ = [
    "CONTENT_TYPE",
    "ENDPOINTS",
    "FINISH_REASONS",
    "REJECTIONS",
    "HttpMetrics",
    "Metrics",
    "ModelFacts",
    "RequestObserver",
]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# When each counter was made: in this format a second series for every one.
disable_created_metrics()  # type: ignore[no-untyped-call]


class MetricsServer:
    """A port that answers scrapes."""

    def __init__(self, server: WSGIServer, thread: Thread) -> None:
        self._server = server
        self._thread = thread

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Metrics:
    """All series of one app, in a registry of its own."""

    def __init__(self, config: ServerConfig, registry: CollectorRegistry | None = None) -> None:
        names = tuple(model.name for model in config.models)
        self.registry = registry = registry or CollectorRegistry()
        self.http = HttpMetrics(registry)
        self.requests = RequestMetrics(registry)
        self.speculation = SpeculationMetrics(registry, names, config.decoding.max_gamma)
        self.engine = EngineMetrics(registry, names)
        self.speedup = SpeedupMetrics(registry, names)
        ProcessCollector(registry=registry)  # exports nothing where there is no /proc
        _describe(registry, config)

    def observe_step(self, stats: StepStats) -> None:
        """Count one engine step."""
        self.speculation.observe(stats)
        self.engine.observe(stats)
        self.speedup.observe(stats)

    def request(
        self, endpoint: str, num_prompt_tokens: int, stats: Row[SequenceStats] = ()
    ) -> RequestObserver:
        """A context that watches one accepted request; `stats` are those of its sequences."""
        return RequestObserver(self.requests, endpoint, num_prompt_tokens, stats)

    def reject(self, reason: str) -> None:
        """Count a request that was refused before any work; `reason` is one of REJECTIONS."""
        self.requests.rejected.labels(reason).inc()

    def serve(self, host: str, port: int) -> MetricsServer:
        """Answer scrapes on a port of their own, in a thread.

        Raises:
            OSError: the port cannot be had.
        """
        server, thread = start_http_server(port, host, self.registry)
        return MetricsServer(server, thread)

    def render(self) -> bytes:
        """The text format, of type CONTENT_TYPE."""
        return generate_latest(self.registry)


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

"""What the routes share: the configuration, the metrics, and the engine once it is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from server.api.clients import ANONYMOUS, Clients
from server.api.codec import Codec
from server.api.decoding import DecodingDefaults
from server.api.grammar_threads import GrammarThreads
from server.api.keys import load_keys
from server.config import HttpConfig, ServerConfig
from server.decoding.grammar import Grammars
from server.engine.async_engine import AsyncEngine
from server.errors import ConfigError, EngineDead, EngineDraining, EngineOverloaded, ModelNotFound
from server.metrics import Metrics
from server.tracing import RequestTracer

_RENDER_THREADS = 4
# Texts of more characters, or tokens, than this are converted so many at a time, and shorter ones
# beside them: the engine needs its share of the processor meanwhile.
_LONG_TEXT = 1 << 14
_MOST_LONG_TEXTS = 2

T = TypeVar("T")

Phase = Literal["loading", "ready", "draining", "failed"]


class Service:
    """State of one app. Lives on the event loop's thread."""

    def __init__(
        self, config: ServerConfig, metrics: Metrics, tracer: RequestTracer | None = None
    ) -> None:
        """Raises ConfigError where the configuration contradicts itself, or keys are unreadable."""
        self.config = config
        self.keys = load_keys(config.http)
        self.clients = Clients(self.keys.names or {ANONYMOUS}, config.http)
        _check_client_limits(config.http, bool(self.keys))
        self.decoding = DecodingDefaults(config)
        self.metrics = metrics
        self.tracer = tracer
        self.started_at = int(time.time())
        self._long_texts = CapacityLimiter(_MOST_LONG_TEXTS)
        self.render_threads = CapacityLimiter(_RENDER_THREADS)
        self.grammar_threads = GrammarThreads(config.http.max_grammar_bytes)
        self.grammars: Grammars | None = None
        self.failure: BaseException | None = None
        self._engine: AsyncEngine | None = None
        self._codec: Codec | None = None
        self._is_draining = False

    @property
    def phase(self) -> Phase:
        if self.failure is not None or (self._engine is not None and self._engine.error):
            return "failed"
        if self._is_draining or (self._engine is not None and self._engine.is_draining):
            return "draining"
        return "ready" if self._engine is not None and self._engine.is_ready else "loading"

    def open(self, engine: AsyncEngine, codec: Codec) -> None:
        """Take requests from now on, unless a shutdown has begun meanwhile."""
        self._engine, self._codec = engine, codec
        if self._is_draining:
            engine.drain()

    def drain(self) -> None:
        """Refuse new requests from now on; what runs goes on."""
        self._is_draining = True
        if self._engine is not None:
            self._engine.drain()

    async def stop(self) -> None:
        """End the engine; streams still open get an error."""
        self.drain()
        if self._engine is not None:
            await self._engine.stop()

    @property
    def num_open(self) -> int:
        """Sequences whose end has not been delivered."""
        return 0 if self._engine is None else self._engine.num_open

    @property
    def engine(self) -> AsyncEngine:
        """Only after `check_ready` has passed."""
        assert self._engine is not None
        return self._engine

    @property
    def codec(self) -> Codec:
        """Only after `check_ready` has passed."""
        assert self._codec is not None
        return self._codec

    async def convert(self, work: Callable[[], T], size: int) -> T:
        """`work()`, which tokenises so many characters or writes so many tokens, off the loop."""
        limiter = self._long_texts if size > _LONG_TEXT else None
        return await to_thread.run_sync(work, limiter=limiter)

    def check_ready(self) -> None:
        """Whether a new request may be served.

        Raises:
            EngineDraining: the server is starting or shutting down.
            EngineDead: the engine has failed.
        """
        match self.phase:
            case "failed":
                raise EngineDead("the engine has failed")
            case "draining":
                raise EngineDraining("the server is shutting down")
            case "loading":
                raise EngineDraining("the models are still loading")

    def check_room(self, num_sequences: int) -> None:
        """Whether the queue takes so many now; the engine itself looks again.

        Raises:
            EngineOverloaded: it does not.
        """
        limits, num_open = self.config.engine, self.num_open
        if num_open + num_sequences > limits.max_sequences + limits.max_waiting:
            raise EngineOverloaded(
                f"{num_open} sequences are running or waiting and this request adds "
                f"{num_sequences}; the limit is {limits.max_sequences} running and "
                f"{limits.max_waiting} waiting"
            )

    def check_model(self, name: str) -> None:
        """Raises ModelNotFound for any name but the one that is served."""
        if name != self.config.served_model_name:
            raise ModelNotFound(name, self.config.served_model_name)


def _check_client_limits(http: HttpConfig, has_keys: bool) -> None:
    limits = ("max_open_requests_per_key", "tokens_per_minute_per_key")
    for field in () if has_keys else limits:
        if getattr(http, field) is not None:
            raise ConfigError(f"http.{field} needs API keys: http.keys_file or ${http.keys_env}")


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service

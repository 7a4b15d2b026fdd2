"""create_app: routes, middlewares, and the life of the engine behind them.

loading   the port is open, models load in a thread; /ready is 503 and requests are refused
ready     requests are served
draining  /ready is 503, new requests are refused, running ones go on
failed    loading or the engine has failed: /health is 503, and `on_failure` is told
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from server import __version__
from server.api import chat, completions, health, models, tokenizing
from server.api.chat_template import ChatTemplate, TemplatedTokenizer, TokenizerTemplate
from server.api.codec import Codec, Tokenizer
from server.api.decoding import make_combination
from server.api.errors import install_error_handlers
from server.api.gate import AdmissionMiddleware, AuthMiddleware
from server.api.middleware import (
    BodyLimitMiddleware,
    CatchAllMiddleware,
    HttpMetricsMiddleware,
    RequestIdMiddleware,
)
from server.api.openapi import install_openapi
from server.api.routes import RouteTable
from server.api.service import Service
from server.api.sse import outlive_shutdown_signals
from server.config import ServerConfig
from server.decoding.grammar import Grammars
from server.engine.async_engine import AsyncEngine
from server.engine.calibration import calibrate
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.errors import CosError
from server.metrics import Metrics, ModelFacts
from server.tracing import RequestTracer, make_tracer

if TYPE_CHECKING:
    from server.runner.loader import LoadedRunner

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOADER = "loader"  # threads that load models, or tell a collector the rest
_TRACING_SECONDS = 3  # that the collector gets at the end


@dataclass(frozen=True, slots=True)
class Parts:
    """What serves requests once it is loaded."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    vocab_size: int
    chat_template: ChatTemplate | None = None
    special_tokens: Mapping[str, str] | None = None
    grammars: Grammars | None = None


Load = Callable[[], Parts]


def create_app(
    config: ServerConfig,
    engine: AsyncEngine | None = None,
    tokenizer: Tokenizer | None = None,
    chat_template: ChatTemplate | None = None,
    *,
    load: Load | None = None,
    grammars: Grammars | None = None,
    metrics: Metrics | None = None,
    tracer: RequestTracer | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """An app of its own: nothing is shared with other apps of the process.

    Args:
        config: the whole configuration.
        engine: one that is there already, as in tests; otherwise `load` is called.
        tokenizer: that of `engine`.
        chat_template: that of `tokenizer`.
        grammars: over the vocabulary of `tokenizer`; None refuses structured output.
        load: called in a thread; loads the configured models if not given.
        metrics: those that `engine` reports to.
        tracer: records requests; the configured one if not given.
        on_failure: told on the event loop why the app can serve no more.

    Raises:
        ConfigError: the configuration contradicts itself, or tracing is not installed.
    """
    metrics = metrics or Metrics(config)
    service = Service(config, metrics, tracer or make_tracer(config.tracing))
    metrics.engine.watch_phase(lambda: service.phase)
    if engine is not None:
        assert tokenizer is not None
        vocab_size = tokenizer.get_vocab_size()
        load = partial(Parts, engine, tokenizer, vocab_size, chat_template, grammars=grammars)
    life = _Life(service, load or partial(load_parts, config, metrics), on_failure)
    app = FastAPI(
        title="cos-server",
        version=__version__,
        lifespan=life.lifespan,
        redirect_slashes=False,
        docs_url=None,  # the page would fetch its scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    routers = [module.router for module in (completions, chat, tokenizing, models, health)]
    if config.http.metrics_port is None:
        routers.append(health.metrics_router)
    for router in routers:
        app.include_router(router)
    routes = RouteTable(route for router in routers for route in router.routes)
    app.state.routes = routes
    install_error_handlers(app)
    install_openapi(app, config.served_model_name)
    _add_middlewares(app, service, routes)
    return app


def _add_middlewares(app: FastAPI, service: Service, routes: RouteTable) -> None:
    """The last one added is the outermost."""
    http, metrics = service.config.http, service.metrics
    app.add_middleware(CatchAllMiddleware)
    app.add_middleware(
        BodyLimitMiddleware,
        routes=routes,
        max_bytes=http.max_body_bytes,
        seconds=http.body_seconds,
        on_refusal=metrics.reject,
    )
    app.add_middleware(
        AdmissionMiddleware,
        clients=service.clients,
        max_bytes=http.max_body_bytes,
        on_refusal=metrics.reject,
    )
    app.add_middleware(
        AuthMiddleware,
        keys=service.keys,
        clients=service.clients,
        max_bytes=http.max_body_bytes,
        on_refusal=metrics.reject,
    )
    app.add_middleware(HttpMetricsMiddleware, metrics=metrics.http, routes=routes)
    if http.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(http.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # client libraries send a dozen of their own
            expose_headers=["X-Request-Id", "X-Should-Retry", "Retry-After"],
        )
    app.add_middleware(RequestIdMiddleware)


def load_parts(config: ServerConfig, metrics: Metrics) -> Parts:
    """Load the configured models and put an engine on them; slow.

    Raises:
        ConfigError: they cannot be loaded, or do not fit together.
    """
    # The library's pool would let one long text, alone in its batch, keep short ones waiting.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Here, because it imports transformers: seconds that a client of the port need not wait.
    from server.runner.loader import load_models

    with _phase("models loaded"):
        loaded = load_models(config)
    tokenizer = loaded.tokenizer.backend_tokenizer
    # Some tokenizer files cut or pad what they encode; the server has its own limits.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    with _phase("engine made"):  # a kernel is compiled for it
        engine = Engine(
            loaded.runners,
            tokenizer,
            loaded.eos_token_ids,
            EngineLimits.of(config, loaded.runners),
            on_step=metrics.observe_step,
            coin_seed=secrets.randbits(63),
        )
    engine.on_fault = metrics.engine.observe_fault
    metrics.engine.watch_models(
        engine.scheduler.pages.num_used,
        engine.scheduler.pages.num_idle,
        [_facts(runner) for runner in loaded.runners],
    )
    if config.engine.calibrate:
        combination = make_combination(config.combination, len(config.models))
        with _phase("decoding timed"):
            costs = calibrate(engine, combination)
        if costs is not None:
            engine.control(costs)
            metrics.speedup.calibrated(costs)
    if (shadow := config.engine.shadow) is not None:
        engine.measure_standard(shadow.every_seconds, shadow.rounds)
        metrics.speedup.shadowed()
    grammars = Grammars.of(tokenizer, loaded.vocab_size, loaded.eos_token_ids)
    grammars.prepare()
    parts = Parts(
        AsyncEngine(engine),
        tokenizer,
        loaded.vocab_size,
        _chat_template(loaded.tokenizer),
        loaded.tokenizer.special_tokens_map,
        grammars,
    )
    # What is here stays: a later full collection need not search it, with all threads waiting.
    gc.collect()
    gc.freeze()
    return parts


@contextmanager
def _phase(name: str) -> Iterator[None]:
    """Log how long a part of the start took."""
    started = time.perf_counter()
    yield
    logger.info("%s, %.1f s", name, time.perf_counter() - started)


def _facts(runner: LoadedRunner) -> ModelFacts:
    return ModelFacts(
        device=str(runner.device),
        dtype=str(runner.dtype).removeprefix("torch."),
        weight_bytes=runner.weight_bytes,
        num_pages=runner.num_pages - 1,
        page_bytes=runner.store.bytes_per_token * runner.page_size,
    )


def _chat_template(tokenizer: TemplatedTokenizer) -> ChatTemplate | None:
    try:
        return TokenizerTemplate(tokenizer)
    except ValueError:
        logger.info("the tokenizer has no chat template: /v1/chat/completions will refuse")
        return None


class _Life:
    """Loading, watching and stopping the engine of one app."""

    def __init__(
        self, service: Service, load: Load, on_failure: Callable[[BaseException], None] | None
    ) -> None:
        self._service = service
        self._load = load
        self._on_failure = on_failure

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncGenerator[None]:
        outlive_shutdown_signals()
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await self._service.stop()
            if self._service.tracer is not None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(
                        _in_daemon_thread(self._service.tracer.close), _TRACING_SECONDS
                    )

    async def _run(self) -> None:
        """Load, open, watch."""
        started = time.perf_counter()
        try:
            parts = await _in_daemon_thread(self._load)
            codec = Codec(
                parts.tokenizer, parts.vocab_size, parts.chat_template, parts.special_tokens
            )
        except Exception as error:
            if not isinstance(error, CosError):
                logger.exception("loading failed")
            self._fail(error)
            return
        parts.engine.start()
        self._service.metrics.engine.watch(
            lambda: parts.engine.num_running,
            lambda: parts.engine.num_waiting,
            lambda: parts.engine.idle_seconds,
        )
        self._service.grammars = parts.grammars
        self._service.open(parts.engine, codec)
        seconds = time.perf_counter() - started
        logger.info("ready: %s, %.1f s", self._service.config.served_model_name, seconds)
        await parts.engine.wait_dead()
        self._fail(parts.engine.error or RuntimeError("the engine thread has ended"))

    def _fail(self, error: BaseException) -> None:
        self._service.failure = error
        if self._on_failure is None:
            logger.error("cannot serve: %s", error)
        else:
            self._on_failure(error)


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """`work()` in a thread that does not keep the process alive: it cannot be interrupted."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            result, error = work(), None
        except BaseException as raised:
            result, error = None, raised
        with suppress(RuntimeError):  # the loop has closed meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=LOADER, daemon=True).start()
    return await future

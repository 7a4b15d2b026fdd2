"""A server that streams made-up tokens, for the benchmark to measure."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route


class FakeServer:
    """Two models; `cos` gives two tokens a chunk, everything else one.

    Attributes:
        requests: bodies of the completions asked for, in order of arrival.
        fail: strategy whose requests fail, and how: "status", "event", "cut" or "usage".
    """

    def __init__(
        self,
        fail: tuple[str, str] | None = None,
        step_seconds: float = 0.0,
        has_metrics: bool = True,
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.fail = fail
        self.max_in_flight = 0
        self._in_flight = 0
        self._step_seconds = step_seconds
        self._baseline_seconds = self._decode_seconds = 0.0
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes + [Route("/metrics", self._metrics)] * has_metrics)

    async def _metrics(self, request: Request) -> Response:
        baseline, decode = self._baseline_seconds, self._decode_seconds
        return PlainTextResponse(
            f"cos_baseline_estimated_seconds_total {baseline}\ncos_decode_seconds_total {decode}\n"
            + _positions("verified", [4 * decode, 2 * decode, 0])
            + _positions("accepted", [2 * decode, decode, 0])
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        strategy = body["cos"]["strategy"]
        how = self.fail[1] if self.fail and self.fail[0] == strategy else None
        # Warm-up is short; failures are for requests that count.
        how = how if body["max_tokens"] > 16 else None
        if how == "status":
            return JSONResponse({"error": {"message": "queue is full"}}, status_code=429)
        return StreamingResponse(self._events(body, how), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], how: str | None) -> AsyncIterator[bytes]:
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            async for event in self._stream(body, how):
                yield event
        finally:
            self._in_flight -= 1

    async def _stream(self, body: dict[str, Any], how: str | None) -> AsyncIterator[bytes]:
        max_tokens, strategy = body["max_tokens"], body["cos"]["strategy"]
        width = 2 if strategy == "cos" else 1
        yield b": ping\n\n"
        for done in range(width, max_tokens + width, width):
            await asyncio.sleep(self._step_seconds)
            self._baseline_seconds += width
            self._decode_seconds += 1
            yield _event({"usage": _usage(min(done, max_tokens)), "choices": [{"text": "x"}]})
            if how == "usage":
                yield _event({"usage": {"tokens": 3}, "choices": []})
            if how == "event":
                yield _event({"error": {"message": "broken"}})
            if how == "cut":
                return
        report: dict[str, Any] = {"proposed": [max_tokens, 0], "accepted": [max_tokens // 2, 0]}
        forwards = {"forwards": [max_tokens, max_tokens // width]}
        used = {"strategies": {strategy: max_tokens}, "gamma": [3, 0]}
        report = {**report, **forwards, **used}
        yield _event({"usage": _usage(max_tokens), "choices": [], "cos": report})
        yield b"data: [DONE]\n\n"


def _positions(what: str, counts: list[float]) -> str:
    name = f"cos_spec_{what}_tokens_per_position_total"
    return "".join(
        f'{name}{{proposer="small",position="{i}"}} {count}\n' for i, count in enumerate(counts)
    )


def _usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 3, "completion_tokens": num_tokens, "total_tokens": 3 + num_tokens}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


@contextmanager
def serve(fake: FakeServer) -> Iterator[str]:
    """Runs it on a free port of this machine; yields its base URL."""
    config = uvicorn.Config(fake.app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the fake server did not start")
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)

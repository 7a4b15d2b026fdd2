"""Sends one request to a server and times what comes back."""

from __future__ import annotations

import secrets
import time
from hashlib import blake2b
from typing import Any

import httpx

from server.bench.plan import Block, Job
from server.bench.row import RequestFailed, Row
from server.bench.settings import Settings
from server.bench.sse import read_events

_ERROR_CHARS = 300


class BenchClient:
    """One server, over one pool of connections."""

    def __init__(self, http: httpx.AsyncClient, model: str, settings: Settings) -> None:
        self._http = http
        self._model = model
        self._settings = settings
        self._epoch = time.perf_counter()
        self._run = secrets.token_hex(16)

    async def send(self, block: Block, job: Job) -> Row:
        """A failure ends in the row's `error`; it never raises one."""
        row = Row(
            prompt_set=block.prompt_set,
            concurrency=block.concurrency,
            strategy=block.strategy.label,
            round=block.round,
            index=job.index,
            seed=job.seed,
        )
        started = time.perf_counter()
        row.started = started - self._epoch
        try:
            await self._stream(self._body(block, job), row, started)
        except (httpx.HTTPError, RequestFailed) as error:
            row.error = f"{type(error).__name__}: {error}"[:_ERROR_CHARS]
        row.duration = time.perf_counter() - started
        return row

    def _body(self, block: Block, job: Job) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "temperature": self._settings.temperature,
            **({"seed": job.seed} if self._settings.send_seeds else {}),
            "ignore_eos": self._settings.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "cos": block.strategy.override,
            "cache_salt": self._salt(block),
            **self._settings.body,
        }

    def _salt(self, block: Block) -> str:
        """What one block leaves in the server's prefix cache helps no other, nor another run."""
        place = (block.prompt_set, block.concurrency, block.round, block.strategy.label)
        return blake2b(repr((self._run, place)).encode(), digest_size=16).hexdigest()

    async def _stream(self, body: dict[str, Any], row: Row, started: float) -> None:
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                raise RequestFailed(f"HTTP {response.status_code}: {text}")
            clock = ChunkClock(row, started)
            async for event in read_events(response.aiter_lines()):
                clock.take(event, time.perf_counter())
        if row.num_tokens == 0:
            raise RequestFailed("the stream ended without a token")


class ChunkClock:
    """Turns chunks and the moments they came at into a row.

    A chunk carries as many tokens as one verification gave, so times are kept by chunk together
    with their token counts, and per-token latency is the time divided by the count.
    """

    def __init__(self, row: Row, started: float) -> None:
        self._row = row
        self._started = started
        self._last = started

    def take(self, event: dict[str, Any], now: float) -> None:
        """Raises RequestFailed where the event is an error or its usage cannot be read."""
        if (error := event.get("error")) is not None:
            raise RequestFailed(f"error event: {error}")
        self._row.cos = event.get("cos") or self._row.cos
        if (usage := event.get("usage")) is None:
            return
        try:
            num_prompt, num_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        except (LookupError, TypeError, ValueError):
            raise RequestFailed(f"usage without token counts: {usage}") from None
        self._row.num_prompt_tokens = num_prompt
        if num_tokens > self._row.num_tokens:
            self._count(num_tokens - self._row.num_tokens, now)

    def _count(self, num_new: int, now: float) -> None:
        row = self._row
        if row.ttft is None:
            row.ttft, row.first_tokens = now - self._started, num_new
        else:
            row.gaps.append((now - self._last, num_new))
        row.num_tokens += num_new
        self._last = now

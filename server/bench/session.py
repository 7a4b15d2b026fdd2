"""A connection to a server, and one run over it: send every block, show progress."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from server.api_key import authorization
from server.bench.client import BenchClient
from server.bench.closed_loop import BlockResult, run_block
from server.bench.plan import Block, plan
from server.bench.reading import take_reading
from server.bench.settings import Settings
from server.errors import CosError


class BenchError(CosError):
    """The server could not be measured."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server to measure; `model` None takes the first one it lists."""

    base_url: str
    model: str | None
    timeout_seconds: float


class Connection:
    """Sends blocks to one model of a server."""

    def __init__(self, http: httpx.AsyncClient, model: str, settings: Settings) -> None:
        self.model = model
        self._http = http
        self._client = BenchClient(http, model, settings)

    async def run(self, block: Block, on_row: Callable[[], None] = lambda: None) -> BlockResult:
        """One block, with what the server counted meanwhile.

        Raises:
            BenchError: a request of a warm-up failed.
        """
        before = await take_reading(self._http)
        result = await run_block(block, self._client.send, on_row)
        after = await take_reading(self._http)
        if block.is_warmup and result.num_errors:
            error = next(row.error for row in result.rows if row.error is not None)
            raise BenchError(f"warm-up of {block.strategy.label} failed: {error}")
        if before is None or after is None:
            return result
        return replace(result, reading=after.since(before))


@asynccontextmanager
async def connect(target: Target, settings: Settings) -> AsyncIterator[Connection]:
    """Raises BenchError where no server answers."""
    limits = httpx.Limits(max_connections=max(settings.concurrency) + 1)
    # trust_env: a proxy between client and server would be measured with it.
    async with httpx.AsyncClient(
        base_url=target.base_url,
        headers=authorization(),
        timeout=target.timeout_seconds,
        limits=limits,
        trust_env=False,
    ) as http:
        yield Connection(http, target.model or await first_model(http), settings)


async def measure(
    target: Target, settings: Settings, console: Console
) -> tuple[dict[str, Any], list[BlockResult]]:
    """What the server says of itself, and the result of every block that counts.

    Raises:
        BenchError: no server there, or even the warm-up failed.
    """
    async with connect(target, settings) as connection:
        with _progress(console) as progress:
            results = await _run(plan(settings), connection, progress)
    return {"base_url": target.base_url, "model": connection.model}, results


async def _run(
    blocks: list[Block], connection: Connection, progress: Progress
) -> list[BlockResult]:
    task = progress.add_task("", total=sum(len(block.jobs) for block in blocks))
    results = []
    for block in blocks:
        progress.update(task, description=_title(block))
        result = await connection.run(block, lambda: progress.advance(task))
        if not block.is_warmup:
            results.append(result)
    return results


async def first_model(http: httpx.AsyncClient) -> str:
    """Name of the first model that a server has. Raises BenchError."""
    try:
        response = await http.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{http.base_url}: no list of models to be had: {error}") from error


def _title(block: Block) -> str:
    what = "warm-up" if block.is_warmup else f"round {block.round + 1}"
    return f"{block.prompt_set} ×{block.concurrency} {what} {block.strategy.label}"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)

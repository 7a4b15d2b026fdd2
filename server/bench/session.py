"""One run: find the model, send every block, show progress."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from server.api_key import authorization
from server.bench.client import BenchClient
from server.bench.closed_loop import BlockResult, run_block
from server.bench.estimate import read_estimate
from server.bench.plan import Block, plan
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


async def measure(
    target: Target, settings: Settings, console: Console
) -> tuple[dict[str, Any], list[BlockResult]]:
    """What the server says of itself, and the result of every block that counts.

    Raises:
        BenchError: no server there, or even the warm-up failed.
    """
    limits = httpx.Limits(max_connections=max(settings.concurrency) + 1)
    # trust_env: a proxy between client and server would be measured with it.
    async with httpx.AsyncClient(
        base_url=target.base_url,
        headers=authorization(),
        timeout=target.timeout_seconds,
        limits=limits,
        trust_env=False,
    ) as http:
        model = target.model or await _first_model(http)
        client = BenchClient(http, model, settings)
        with _progress(console) as progress:
            results = await _run(plan(settings), http, client, progress)
    return {"base_url": target.base_url, "model": model}, results


async def _run(
    blocks: list[Block], http: httpx.AsyncClient, client: BenchClient, progress: Progress
) -> list[BlockResult]:
    task = progress.add_task("", total=sum(len(block.jobs) for block in blocks))
    results = []
    for block in blocks:
        progress.update(task, description=_title(block))
        before = await read_estimate(http)
        result = await run_block(block, client.send, lambda: progress.advance(task))
        after = await read_estimate(http)
        if before is not None and after is not None:
            result = replace(result, estimate=after.since(before))
        if not block.is_warmup:
            results.append(result)
        elif result.num_errors:
            error = next(row.error for row in result.rows if row.error is not None)
            raise BenchError(f"warm-up of {block.strategy.label} failed: {error}")
    return results


async def _first_model(http: httpx.AsyncClient) -> str:
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

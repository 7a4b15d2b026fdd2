"""Keeps a fixed number of requests in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from server.bench.plan import Block, Job
from server.bench.reading import Reading
from server.bench.row import Row


@dataclass(frozen=True, slots=True)
class BlockResult:
    """A block's rows, wall time from first request to last answer, and what the server counted."""

    prompt_set: str
    concurrency: int
    strategy: str
    round: int
    seconds: float
    rows: tuple[Row, ...]
    reading: Reading | None = None

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_errors(self) -> int:
        return sum(row.error is not None for row in self.rows)


async def run_block(
    block: Block, send: Callable[[Block, Job], Awaitable[Row]], on_row: Callable[[], None]
) -> BlockResult:
    """Each of `block.concurrency` workers sends its next job once its last one is answered."""
    rows: list[Row] = []
    jobs = iter(block.jobs)

    async def work() -> None:
        for job in jobs:
            rows.append(await send(block, job))
            on_row()

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(block.concurrency)))
    seconds = time.perf_counter() - started
    rows.sort(key=lambda row: row.index)
    return BlockResult(
        prompt_set=block.prompt_set,
        concurrency=block.concurrency,
        strategy=block.strategy.label,
        round=block.round,
        seconds=seconds,
        rows=tuple(rows),
    )

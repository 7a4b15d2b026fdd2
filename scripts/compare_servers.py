r"""Tokens per second of several OpenAI-compatible servers, side by side in one run.

    python -m scripts.compare_servers --server ours=http://127.0.0.1:8000 \
        --server other=http://127.0.0.1:8001 --concurrency 1,4,16

Servers take turns within short rounds, each round with new prompts, the order rotating, so that a
machine that drifts slows all of them. They should serve the same weights; only one of them works at
a time. A server of this project decodes its last model alone. The ratio is that of the first server
to each other one, of all rounds together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from server.bench.client import BenchClient
from server.bench.closed_loop import BlockResult, run_block
from server.bench.machine import describe_machine, describe_versions
from server.bench.plan import Block, make_jobs
from server.bench.prompts import load_prompts
from server.bench.session import first_model
from server.bench.settings import Settings
from server.bench.strategy_spec import StrategySpec, parse_concurrency, parse_object
from server.errors import ConfigError, CosError

_WARMUP = -1
# Prompts of a round for each request in flight, at least: with fewer, the beginning, where prompts
# are read, and the end, where few texts are left, would be most of a round.
_WAVES = 3


@dataclass(frozen=True, slots=True)
class Point:
    """All rounds of one server at one concurrency."""

    server: str
    concurrency: int
    results: tuple[BlockResult, ...]

    @property
    def token_rate(self) -> float:
        """Tokens per second."""
        seconds = sum(result.seconds for result in self.results)
        return sum(result.num_tokens for result in self.results) / seconds

    @property
    def num_errors(self) -> int:
        return sum(result.num_errors for result in self.results)

    def ratio(self, other: Point) -> float:
        """Of tokens per second."""
        return self.token_rate / other.token_rate

    def ratios(self, other: Point) -> list[float]:
        """By round."""
        return [
            (mine.num_tokens / mine.seconds) / (its.num_tokens / its.seconds)
            for mine, its in zip(self.results, other.results, strict=True)
        ]


async def compare(urls: dict[str, str], settings: Settings) -> list[Point]:
    """Measure every server at every concurrency; servers by name."""
    points = []
    async with AsyncExitStack() as stack:
        clients = {name: await _client(stack, url, settings) for name, url in urls.items()}
        for concurrency in settings.concurrency:
            rounds: dict[str, list[BlockResult]] = {name: [] for name in urls}
            for round in range(_WARMUP, settings.rounds):
                shift = max(0, round) % len(urls)
                for name in [*urls][shift:] + [*urls][:shift]:
                    block = _block(settings, name, concurrency, round)
                    result = await run_block(block, clients[name].send, lambda: None)
                    if round != _WARMUP:
                        rounds[name].append(result)
            points += [Point(name, concurrency, tuple(rounds[name])) for name in urls]
    return points


async def _client(stack: AsyncExitStack, url: str, settings: Settings) -> BenchClient:
    limits = httpx.Limits(max_connections=max(settings.concurrency) + 1)
    # trust_env: a proxy between client and server would be measured with it.
    http = httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False)
    await stack.enter_async_context(http)
    return BenchClient(http, await first_model(http), settings)


def _block(settings: Settings, name: str, concurrency: int, round: int) -> Block:
    count = max(settings.num_prompts, settings.rounds * _WAVES * concurrency)
    jobs = make_jobs(settings.prompt_sets[0], count, settings.seed, settings.max_tokens)
    chosen = jobs[-concurrency:] if round == _WARMUP else jobs[round :: settings.rounds]
    spec = StrategySpec(name, {"strategy": "single"})
    return Block(settings.prompt_sets[0].name, concurrency, round, spec, chosen)


def print_table(points: Sequence[Point], console: Console) -> None:
    """Rates, and the first server's ratio to the others with its range over the rounds."""
    table = Table("in flight", "server", "tokens/s", "errors", "ratio of the first to it")
    firsts = {point.concurrency: point for point in reversed(points)}
    for point in points:
        first = firsts[point.concurrency]
        ratio = ""
        if point is not first and not first.num_errors and not point.num_errors:
            by_round = first.ratios(point)
            ratio = f"{first.ratio(point):.2f} ({min(by_round):.2f}-{max(by_round):.2f})"
        rate, errors = f"{point.token_rate:.1f}", str(point.num_errors)
        table.add_row(str(point.concurrency), point.server, rate, errors, ratio)
    console.print(table)


def _document(points: Sequence[Point], urls: dict[str, str]) -> dict[str, Any]:
    return {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "servers": urls,
        "points": [
            {
                "server": point.server,
                "concurrency": point.concurrency,
                "tokens_per_second": point.token_rate,
                "errors": point.num_errors,
                "rounds": [[result.num_tokens, result.seconds] for result in point.results],
            }
            for point in points
        ],
    }


def _servers(entries: Sequence[str]) -> dict[str, str]:
    urls = {}
    for entry in entries:
        name, separator, url = entry.partition("=")
        if not (name and separator and url) or name in urls:
            raise ConfigError(f"--server {entry}: expected NAME=URL, each name once")
        urls[name] = url
    return urls


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.compare_servers")
    add = parser.add_argument
    add("--server", action="append", required=True, metavar="NAME=URL", help="repeatable")
    add("--prompts", default="humaneval", help="bundled name or file (%(default)s)")
    add(
        "--num-prompts",
        type=int,
        default=64,
        help="of each server and concurrency, at least; a round has three for each request in "
        "flight in any case (%(default)s)",
    )
    add("--max-tokens", type=int, default=64, help="of each request (%(default)s)")
    add("--concurrency", default="1,4,16", help="requests in flight (%(default)s)")
    add("--rounds", type=int, default=4, help="in which servers take turns (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    add("--body", metavar="JSON", help="further fields of every request")
    add("--out", type=Path, help="write results as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a server cannot be measured or a request failed."""
    options, console = _parse(argv), Console()
    try:
        urls = _servers(options.server)
        settings = Settings(
            prompt_sets=(load_prompts(options.prompts),),
            strategies=(),
            concurrency=parse_concurrency(options.concurrency),
            num_prompts=options.num_prompts,
            rounds=options.rounds,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=0,
            ignore_eos=True,
            warmup=1,
            body=parse_object(options.body, "--body") or {},
        )
        points = asyncio.run(compare(urls, settings))
    except CosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.out is not None:
        options.out.write_text(json.dumps(_document(points, urls), indent=1), encoding="utf-8")
    print_table(points, console)
    return 1 if any(point.num_errors for point in points) else 0


if __name__ == "__main__":
    sys.exit(main())

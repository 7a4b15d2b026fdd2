r"""How many greedy texts depend on how they are decoded: alone, beside others, speculatively.

    python -m scripts.same_texts --server http://127.0.0.1:8000 --strategies standard,cos:gamma=3

Every prompt is first decoded alone by `standard`, then again by each strategy, alone and so many
`--concurrency` at once. In float32 texts hardly ever differ. In 16 bits sums that run in another
order round to other numbers, and where two tokens are nearly level the other one may win.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from server.bench.prompts import load_prompts
from server.bench.session import first_model
from server.bench.strategy_spec import StrategySpec, parse_strategies
from server.errors import CosError

_REFERENCE = StrategySpec("standard", {"strategy": "standard"})


class Client:
    """Completes prompts of one server greedily."""

    def __init__(self, http: httpx.AsyncClient, model: str, num_tokens: int) -> None:
        self._http = http
        self._model = model
        self._num_tokens = num_tokens
        self._num_runs = 0

    async def texts(
        self, prompts: Sequence[str], strategy: StrategySpec, concurrency: int
    ) -> list[list[int]]:
        """Token ids of each prompt's text.

        Raises:
            CosError: the server cannot be reached, or refuses a request.
        """
        gate = asyncio.Semaphore(concurrency)
        self._num_runs += 1
        run = self._num_runs
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._text(prompt, strategy, f"same-texts-{run}", gate))
                    for prompt in prompts
                ]
        except* httpx.HTTPError as errors:
            raise CosError(f"{self._http.base_url}: {errors.exceptions[0]}") from errors
        return [task.result() for task in tasks]

    async def _text(
        self, prompt: str, strategy: StrategySpec, salt: str, gate: asyncio.Semaphore
    ) -> list[int]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": self._num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "cache_salt": salt,  # a cached prompt is another way to the same text
            "cos": strategy.override,
        }
        async with gate:
            answer = await self._http.post("/v1/completions", json=body)
        ids: list[int] = answer.raise_for_status().json()["choices"][0]["token_ids"]
        return ids


async def compare(options: argparse.Namespace, strategies: Sequence[StrategySpec]) -> Table:
    """One row for each strategy and concurrency."""
    prompts = load_prompts(options.prompts).prompts[: options.num_prompts]
    table = Table("strategy", "at once", "same texts", "same tokens before they part")
    async with httpx.AsyncClient(base_url=options.server, timeout=600, trust_env=False) as http:
        client = Client(http, await first_model(http), options.max_tokens)
        alone = await client.texts(prompts, _REFERENCE, 1)
        for strategy in strategies:
            for concurrency in sorted({1, options.concurrency}):
                texts = await client.texts(prompts, strategy, concurrency)
                agreed = [_agreed(*pair) for pair in zip(alone, texts, strict=True)]
                same = sum(count == options.max_tokens for count in agreed)
                share = sum(agreed) / (options.max_tokens * len(agreed))
                row = (strategy.label, str(concurrency), f"{same} of {len(agreed)}", f"{share:.1%}")
                table.add_row(*row)
    return table


def _agreed(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens before the first difference."""
    for count, (one, other) in enumerate(zip(first, second, strict=True)):
        if one != other:
            return count
    return len(first)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.same_texts")
    add = parser.add_argument
    add("--server", required=True, metavar="URL")
    add("--prompts", default="humaneval", help="bundled name or file (%(default)s)")
    add("--num-prompts", type=int, default=32, help="(%(default)s)")
    add("--max-tokens", type=int, default=48, help="of each text (%(default)s)")
    add("--strategies", default="standard,cos:gamma=3", help="(%(default)s)")
    add("--concurrency", type=int, default=8, help="texts at once (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where the server fails; texts that differ are a result, no failure."""
    options = _parse(argv)
    try:
        table = asyncio.run(compare(options, parse_strategies(options.strategies, None)))
    except CosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

r"""Speedups over a whole grid: kinds of decoding x prompt files x concurrency, in one sitting.

    python -m server serve --config configs/default.yaml
    python -m server.bench.grid --out grid.json --cell-seconds 40

One server is measured. In each cell `standard` and another strategy take turns in the order ABBA
with new prompts every time, so that a drift of the machine cancels, until the cell's seconds are
spent; one turn ABBA is always finished. A block has several requests for each one in flight, of
unequal lengths: else all would begin and end together, and a block would be as fast as its slowest
text. Each finished cell is written to the file at once, and
cells that are in it already are left out: what was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from server.bench.closed_loop import BlockResult
from server.bench.plan import WARMUP_ROUND, WARMUP_TOKENS, Block, Job, rotated
from server.bench.prompts import PromptSet, load_prompts
from server.bench.result_file import ResultFile, read_document
from server.bench.session import Target, connect
from server.bench.settings import Settings
from server.bench.strategy_spec import (
    BASELINE,
    StrategySpec,
    parse_concurrency,
    parse_strategies,
)
from server.bench.summary import Summary, summarise
from server.errors import ConfigError, CosError


@dataclass(frozen=True, slots=True)
class Kind:
    """What is asked of every request of a cell."""

    combination: dict[str, Any]
    temperature: float


_CONTRASTIVE = {"method": "contrastive", "mu": 0.1}
_WEIGHTED = {"method": "weighted", "weights": [0.5, 0.5]}
KINDS = {
    "contrastive-t0": Kind(_CONTRASTIVE, 0.0),
    "contrastive-t1": Kind(_CONTRASTIVE, 1.0),
    "weighted-t1": Kind(_WEIGHTED, 1.0),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the grid; `kind` is a key of KINDS."""

    kind: str
    prompt_set: PromptSet
    concurrency: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.kind, self.prompt_set.name, self.concurrency


Key = tuple[str, str, int]
_WAVES = 3  # requests of a block for each one in flight
_MAX_JOBS = 64  # of a block, where there are more than two for each
_STRIDE = 19  # between the lengths of neighbours; has no factor in common with most sums + 1
# Bundled files with more prompts than a turn takes, so that all are new to the prefix cache.
PROMPTS = ("humaneval", "gsm8k", "mmlu")


def read_grid(path: Path) -> dict[str, Any]:
    """A result file of this module. Raises ConfigError."""
    document = read_document(path)
    try:
        list(cells_of(document))
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path}: no result of server.bench.grid: {error}") from error
    return document


def cells_of(document: dict[str, Any]) -> Iterator[tuple[Key, list[Summary]]]:
    """(kind, prompt set, concurrency) of each cell, and its summaries, standard first."""
    for cell in document["cells"]:
        summaries = [Summary(**summary) for summary in cell["summaries"]]
        yield (cell["kind"], summaries[0].prompt_set, summaries[0].concurrency), summaries


def _record(cell: Cell, summaries: list[Summary], results: list[BlockResult]) -> dict[str, Any]:
    return {
        "kind": cell.kind,
        "summaries": [dataclasses.asdict(summary) for summary in summaries],
        "blocks": [
            [block.strategy, block.round, block.num_tokens, round(block.seconds, 3)]
            for block in results
        ],
    }


def blocks_of(
    cell: Cell, strategies: tuple[StrategySpec, ...], max_tokens: int
) -> Iterator[tuple[Block, ...]]:
    """Turns without end, each of two rounds of both strategies: ABBA."""
    size = max(cell.concurrency, min(_WAVES * cell.concurrency, _MAX_JOBS), 2)
    for first in range(0, 1 << 30, 2):
        yield tuple(
            Block(
                cell.prompt_set.name,
                cell.concurrency,
                number,
                strategy,
                _jobs(cell.prompt_set, number * size, size, max_tokens),
            )
            for number in (first, first + 1)
            for strategy in rotated(strategies, number)
        )


def _jobs(prompt_set: PromptSet, start: int, count: int, max_tokens: int) -> tuple[Job, ...]:
    """Of `max_tokens` tokens on average, evenly spread from half to one and a half of them."""
    prompts = prompt_set.prompts
    shortest = (max_tokens + 1) // 2
    return tuple(
        Job(prompts[i % len(prompts)], i, i, shortest + i * _STRIDE % (max_tokens + 1))
        for i in range(start, start + count)
    )


async def measure_cell(
    target: Target, cell: Cell, options: argparse.Namespace, is_first: bool
) -> list[BlockResult]:
    """All blocks that count.

    Args:
        target: the server.
        cell: of the grid.
        options: of the command line.
        is_first: of its kind; the server is warmed with a few short requests then.
    """
    kind = KINDS[cell.kind]
    strategies = parse_strategies(f"{BASELINE},{options.strategy}", kind.combination)
    settings = Settings(
        prompt_sets=(cell.prompt_set,),
        strategies=strategies,
        concurrency=(cell.concurrency,),
        num_prompts=0,
        rounds=0,
        max_tokens=options.max_tokens,
        temperature=kind.temperature,
        seed=0,
        ignore_eos=True,
        warmup=0,
        send_seeds=False,
    )
    results: list[BlockResult] = []
    async with connect(target, settings) as connection:
        if is_first:
            jobs = _jobs(cell.prompt_set, 0, options.warmup, WARMUP_TOKENS)
            for strategy in strategies if jobs else ():
                name = cell.prompt_set.name
                await connection.run(Block(name, len(jobs), WARMUP_ROUND, strategy, jobs))
        started = time.monotonic()
        for number, turn in enumerate(blocks_of(cell, strategies, options.max_tokens), start=1):
            results += [await connection.run(block) for block in turn]
            spent = time.monotonic() - started
            # Another turn takes as long as those before did.
            if spent + spent / number > options.cell_seconds:
                return results
    raise AssertionError("turns never end")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where the server could not be measured or a request failed, 2 for options."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options, console = _parse(argv), Console(soft_wrap=True)
    try:
        return _measure(options, console)
    except CosError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
        return 2 if isinstance(error, ConfigError) else 1


def _measure(options: argparse.Namespace, console: Console) -> int:
    cells = [
        Cell(kind, prompt_set, concurrency)
        for kind in options.kinds
        for prompt_set in [load_prompts(source) for source in options.prompts]
        for concurrency in parse_concurrency(options.concurrency)
    ]
    described = {
        "strategy": options.strategy,
        "max_tokens": options.max_tokens,
        "requests_per_slot": _WAVES,
    }
    target = Target(options.base_url, options.model, 600.0)
    file = ResultFile(options.out, described)
    done = dict(cells_of(read_grid(options.out))) if options.out.exists() else {}
    warm: set[str] = set()
    num_failed = 0
    for number, cell in enumerate(cells, start=1):
        if cell.key in done:
            continue
        started = time.monotonic()
        results = asyncio.run(measure_cell(target, cell, options, cell.kind not in warm))
        warm.add(cell.kind)
        failed = sum(result.num_errors for result in results)
        done[cell.key] = summaries = summarise(results)
        if not failed:  # else the cell is left for another run
            file.append(_record(cell, summaries, results))
        num_failed += failed
        seconds = time.monotonic() - started
        console.print(
            f"[{number}/{len(cells)}] {' '.join(map(str, cell.key))}: {_ratio(summaries[1])} "
            f"in {seconds:.0f} s{f', {failed} requests failed' if failed else ''}",
            markup=False,
        )
    print(grid_table(done))
    return 1 if num_failed else 0


COLUMNS = (
    "kind",
    "prompts",
    "in flight",
    "standard, tokens/s",
    "tokens/s",
    "x standard (rounds)",
    "decode only",
    "engine",
    "estimated",
    "mean gamma",
    "used",
)


def grid_table(cells: dict[Key, list[Summary]]) -> str:
    """Markdown, one row for each cell."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for (kind, name, concurrency), (standard, other) in cells.items():
        used = " ".join(f"{strategy} {share:.0%}" for strategy, share in other.used.items())
        rows.append(
            (
                kind,
                name,
                str(concurrency),
                f"{standard.tokens_per_second:.1f}",
                f"{other.tokens_per_second:.1f}",
                _ratio(other),
                _number(other.decode_ratio),
                _number(other.engine_ratio),
                _number(other.estimated_ratio),
                " / ".join(map(_number, other.gamma)),
                used,
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _ratio(summary: Summary) -> str:
    low, high = _number(summary.ratio_low), _number(summary.ratio_high)
    return f"{_number(summary.ratio)} ({low}-{high})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.bench.grid")
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="the server (%(default)s)")
    add("--model", help="model name to ask for; the server's first one if not given")
    add("--out", type=Path, required=True, help="result file, made or gone on with")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="(all)")
    add("--prompts", nargs="+", default=list(PROMPTS), help="bundled names or files (%(default)s)")
    add("--concurrency", default="1,4,16,32", help="requests in flight (%(default)s)")
    add("--strategy", default="auto", help="beside standard (%(default)s)")
    add("--max-tokens", type=int, default=64, help="of a request, on average (%(default)s)")
    add("--cell-seconds", type=float, default=40.0, help="about so long (%(default)s)")
    add("--warmup", type=int, default=4, help="short requests before each kind (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

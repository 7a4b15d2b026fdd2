"""Speed of strategies beside each other, in short turns, so that a drifting machine slows both.

    python -m server.bench.lockstep --config configs/default.yaml --concurrency 16

One engine for each strategy, with all that a server gives it, in this process. They decode the same
prompts in closed loops and take turns of a second, in which caches are as warm as where one engine
works alone. Only their own steps' seconds count, from the first text that ends until there is none
to follow the next one: so many are in flight all the time, each with its prompt to read. What HTTP
costs is not in it, and every engine holds the models once more. With `--schema` texts have seeds:
all strategies write the same ones. With `--out` each cell is written to a file at once, and those
in it are left out.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence as Row
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from server.bench.grid import KINDS, PROMPTS, Cell
from server.bench.in_process import InProcessEngine
from server.bench.machine import describe_machine, describe_versions, git_hash
from server.bench.prompts import load_prompts
from server.bench.result_file import ResultFile
from server.bench.strategy_spec import StrategySpec, parse_concurrency, parse_strategies
from server.config import ServerConfig
from server.config_file import load_config
from server.core.sampling_params import SamplingParams
from server.core.sequence import Sequence
from server.errors import ConfigError

_TURN_SECONDS = 1.0
_SPREAD = 0.5  # of the lengths of texts around their mean, so that they do not end together
_LEAST_TEXTS = 24  # of a cell: with one in flight a few texts would be all


@dataclass(frozen=True, slots=True)
class Work:
    """Texts to write: a prompt and a number of tokens each, `concurrency` of them at once.

    Attributes:
        cache_salt: their prompts are found in the prefix cache under this one only.
        schema: JSON schema that all follow; they end with it, if their tokens do not before.
    """

    texts: Row[tuple[str, int]]
    concurrency: int
    temperature: float
    cache_salt: str = ""
    schema: str | None = None

    @staticmethod
    def of(cell: Cell, options: argparse.Namespace) -> Work:
        """`options`: per_slot, max_tokens and schema."""
        rng = random.Random(0)
        least, most = (round(options.max_tokens * (1 + sign * _SPREAD)) for sign in (-1, 1))
        prompts = cell.prompt_set.prompts
        texts = [
            (prompts[number % len(prompts)], rng.randint(max(1, least), most))
            for number in range(max(_LEAST_TEXTS, cell.concurrency * options.per_slot))
        ]
        temperature = KINDS[cell.kind].temperature
        return Work(texts, cell.concurrency, temperature, str(cell.key), options.schema)


@dataclass(slots=True)
class Lane:
    """One strategy at its work.

    Attributes:
        seconds, num_tokens: of the steps that count.
        is_done: as many texts have begun as there are.
    """

    strategy: StrategySpec
    engine: InProcessEngine
    work: Work
    seconds: float = 0.0
    num_tokens: int = 0
    is_done: bool = False
    _num_begun: int = 0
    _counts: bool = False
    _running: list[Sequence] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds

    def step(self) -> None:
        """Keep as many texts running as wanted, then take one step."""
        self._fill()
        before = sum(sequence.num_generated for sequence in self._running)
        started = time.perf_counter()
        self.engine.step()
        seconds = time.perf_counter() - started
        if self._counts:
            self.seconds += seconds
            self.num_tokens += sum(s.num_generated for s in self._running) - before
        left = [sequence for sequence in self._running if not sequence.is_finished]
        self._counts |= len(left) < len(self._running)
        self._running = left
        self.is_done = self._num_begun == len(self.work.texts) and len(left) < self.work.concurrency
        if self.is_done:
            self.engine.drop(left)

    def _fill(self) -> None:
        work = self.work
        while len(self._running) < work.concurrency and self._num_begun < len(work.texts):
            prompt, num_tokens = work.texts[self._num_begun]
            params = SamplingParams(
                max_tokens=num_tokens,
                temperature=work.temperature,
                cache_salt=work.cache_salt,
                # Texts of a form end where they like; all strategies are to write the same ones.
                seed=self._num_begun,
                is_seeded=work.schema is not None,
            )
            sequence = self.engine.start(prompt, params, self.strategy, work.schema)
            self._num_begun += 1
            self._running.append(sequence)


def run(lanes: Row[Lane]) -> None:
    """All steps of all lanes, some in each turn; who goes first changes."""
    turn = 0
    while not all(lane.is_done for lane in lanes):
        shift = turn % len(lanes)
        for lane in (*lanes[shift:], *lanes[:shift]):
            started = time.perf_counter()
            while not lane.is_done and time.perf_counter() - started < _TURN_SECONDS:
                lane.step()
        turn += 1


def table(cells: Row[dict[str, Any]]) -> str:
    """Markdown, one row for each cell: tokens per second, and times the first strategy's."""
    labels = list(cells[0]["lanes"]) if cells else []
    rows = [("kind", "prompts", "in flight", *labels), ("---",) * (3 + len(labels))]
    for cell in cells:
        rows.append((cell["kind"], cell["prompts"], str(cell["in_flight"]), *_rates(cell)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _rates(cell: dict[str, Any]) -> list[str]:
    rates = [lane["num_tokens"] / lane["seconds"] for lane in cell["lanes"].values()]
    return [f"{rate:.1f} ({rate / rates[0]:.2f})" for rate in rates]


def measure(
    options: argparse.Namespace, config: ServerConfig, cells: Row[Cell]
) -> Iterator[dict[str, Any]]:
    """One record for each cell, as soon as it is measured."""
    engines = [InProcessEngine(config) for _ in parse_strategies(options.strategies, None)]
    for cell in cells:
        strategies = parse_strategies(options.strategies, KINDS[cell.kind].combination)
        work = Work.of(cell, options)
        lanes = [Lane(*pair, work) for pair in zip(strategies, engines, strict=True)]
        run(lanes)
        yield {
            "kind": cell.kind,
            "prompts": cell.prompt_set.name,
            "in_flight": cell.concurrency,
            "git": git_hash(),
            "lanes": {
                lane.strategy.label: {"num_tokens": lane.num_tokens, "seconds": lane.seconds}
                for lane in lanes
            },
        }


def main(argv: Row[str] | None = None) -> int:
    """Exit status 2 for options that cannot be."""
    options, console = _parse(argv), Console(soft_wrap=True)
    try:
        _measure(options, console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace, console: Console) -> None:
    concurrency = parse_concurrency(options.concurrency)
    if options.per_slot < 2:
        raise ConfigError("--per-slot: at least 2, for what counts lies between the texts' ends")
    config = load_config(options.config, [f"engine.max_sequences={max(concurrency)}", *options.set])
    names = ("strategies", "per_slot", "max_tokens", "schema", "set")
    settings = {name: getattr(options, name) for name in names} | {"config": str(options.config)}
    file = None if options.out is None else ResultFile(options.out, settings)
    done = [] if file is None else file.cells
    known = {(cell["kind"], cell["prompts"], cell["in_flight"]) for cell in done}
    cells = [
        Cell(kind, prompt_set, count)
        for kind in options.kinds
        for prompt_set in [load_prompts(source) for source in options.prompts]
        for count in concurrency
    ]
    machine, versions = describe_machine(), describe_versions()
    console.print(f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}")
    for record in measure(options, config, [cell for cell in cells if cell.key not in known]):
        done.append(record)
        if file is not None:
            file.append(record)
        place = f"{record['kind']} {record['prompts']} {record['in_flight']}"
        console.print(f"{place}: {', '.join(_rates(record))}", markup=False)
    print(table(done))


def _parse(argv: Row[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.bench.lockstep")
    add = parser.add_argument
    add("--config", type=Path, required=True, help="a configs/*.yaml")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override an entry")
    add("--strategies", default="standard,auto", help="as those of cos-server bench (%(default)s)")
    add("--kinds", nargs="+", choices=KINDS, default=["contrastive-t0"], help="(%(default)s)")
    add("--prompts", nargs="+", default=list(PROMPTS), help="bundled names or files (%(default)s)")
    add("--concurrency", default="16", help="texts at once (%(default)s)")
    add("--per-slot", type=int, default=3, help="texts after each other (%(default)s)")
    add("--max-tokens", type=int, default=48, help="of a text, on average (%(default)s)")
    add("--schema", help="JSON schema that all texts follow, and end with")
    add("--out", type=Path, help="result file, made or gone on with")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Time of one forward of each configured model, by batch and tokens a sequence.

    python -m server.bench.forward --config configs/default.yaml

Both forwards are measured in one process and in turns, so that a busy machine slows both: the one
transformers has, and the one the server uses for this model. The figure is the least of many
rounds. CPU time is that of all threads; wall time means something on an idle machine only.

    python -m server.bench.forward --config configs/default.yaml --threads 2 --goals

measures the shapes for which this project has set itself goals, with SmolLM2-135M on two cores, and
prints these beside the last model's wall times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from server.bench.machine import describe_machine, describe_versions
from server.config_file import load_config
from server.runner.base import Batch, ModelRunner, Span
from server.runner.loader import load_models

SHAPES = ((1, 1), (1, 2), (1, 5), (1, 8), (4, 1), (4, 5), (16, 1), (16, 5))
Goals = Mapping[tuple[int, int], tuple[int | None, int | None]]
# Wall milliseconds at most, of transformers' forward and of the server's; None: no goal.
GOALS: Goals = {
    (1, 1): (30, 21),
    (1, 2): (None, 24),
    (1, 5): (40, 30),
    (1, 8): (None, 34),
    (4, 5): (None, 60),
}
_MAX_BATCH = max(batch for batch, _ in SHAPES)
_MAX_TOKENS = max(tokens for _, tokens in SHAPES)


@dataclass(slots=True)
class Timing:
    """Least seconds of a forward."""

    cpu: float = float("inf")
    wall: float = float("inf")

    def measure(self, runner: ModelRunner, batch: Batch) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        runner.forward(batch)
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        self.wall = min(self.wall, time.perf_counter() - wall)
        self.cpu = min(self.cpu, time.process_time() - cpu)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table for each model."""
    options = _parse(argv)
    console = Console(width=max(Console().width, 100))
    overrides = [
        f"engine.max_sequences={_MAX_BATCH}",
        f"engine.max_length={options.past + _MAX_TOKENS}",
        f"engine.threads={options.threads}",
    ]
    config = load_config(options.config, overrides)
    plain, fast = (load_models(config, fast=fast).runners for fast in (False, True))
    machine, versions = describe_machine(), describe_versions()
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, "
        f"{options.threads or torch.get_num_threads()} threads; past {options.past} tokens, "
        f"{options.shared} of them shared"
    )
    shapes = tuple(GOALS) if options.goals else SHAPES
    for number, pair in enumerate(zip(plain, fast, strict=True), start=1):
        goals = GOALS if options.goals and number == len(fast) else {}
        console.print(_table(pair, shapes, goals, options))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.bench.forward")
    parser.add_argument("--config", type=Path, required=True, help="a configs/*.yaml")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--past", type=int, default=128, help="tokens before (%(default)s)")
    parser.add_argument(
        "--shared", type=int, default=0, help="of them the same pages for all (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=40, help="of each shape (%(default)s)")
    parser.add_argument("--goals", action="store_true", help="only shapes with goals, and these")
    return parser.parse_args(argv)


def _table(
    pair: tuple[ModelRunner, ModelRunner],
    shapes: Sequence[tuple[int, int]],
    goals: Goals,
    options: argparse.Namespace,
) -> Table:
    past: int = options.past
    table = Table(title=pair[0].name, title_justify="left", box=SIMPLE_HEAD)
    for column in (
        "batch",
        "tokens each",
        "transformers\nCPU ms",
        "server\nCPU ms",
        "ratio",
        "transformers\nwall ms",
        "server\nwall ms",
        "ratio",
    ):
        table.add_column(column, justify="right")
    for runner in pair:
        runner.forward(_batch(runner, _MAX_BATCH, 0, past, 0, 0))
    for size, tokens in shapes:
        batches = [_batch(runner, size, past, tokens, tokens, options.shared) for runner in pair]
        timings = [Timing() for _ in pair]
        for _ in range(max(3, options.rounds // size)):
            for runner, batch, timing in zip(pair, batches, timings, strict=True):
                timing.measure(runner, batch)
        cpu, wall = [t.cpu for t in timings], [t.wall for t in timings]
        least = goals.get((size, tokens), (None, None))
        table.add_row(str(size), str(tokens), *_cells(cpu), *_cells(wall, least))
    return table


def _cells(
    seconds: list[float], goals: tuple[int | None, int | None] = (None, None)
) -> tuple[str, ...]:
    times = [_beside(each * 1e3, goal) for each, goal in zip(seconds, goals, strict=True)]
    return (*times, f"{seconds[0] / seconds[1]:.2f}")


def _beside(ms: float, goal: int | None) -> str:
    """`18.9 <= 21` where there is a goal and it is met."""
    if goal is None:
        return f"{ms:.1f}"
    return f"{ms:.1f} {'<=' if ms <= goal else '>'} {goal}"


def _batch(
    runner: ModelRunner, size: int, past: int, tokens: int, num_kept: int, shared: int
) -> Batch:
    """`size` sequences, each feeding `tokens` tokens after `past`; pages lie in order.

    The pages of the first `shared` tokens are the first sequence's for all of them.
    """
    width = runner.num_pages // _MAX_BATCH
    first = range(1, 1 + shared // runner.page_size)
    return Batch(
        tuple(
            Span(
                pages=[*first, *range(1 + number * width + len(first), 1 + (number + 1) * width)],
                num_past=past,
                token_ids=[(7919 * number + 31 * i) % runner.vocab_size for i in range(tokens)],
                num_kept=num_kept,
            )
            for number in range(size)
        )
    )


if __name__ == "__main__":
    main()

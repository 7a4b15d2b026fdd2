"""Time of one forward of each configured model, by batch and tokens a sequence.

    python -m server.bench.forward --config configs/default.yaml

Both forwards are measured in one process and in turns, so that a busy machine slows both: the one
transformers has, and the one the server uses for this model. The figure is the least of many
rounds. CPU time is that of all threads; wall time means something on an idle machine only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from server.bench.machine import describe_machine, describe_versions
from server.config import load_config
from server.runner.base import Batch, ModelRunner, Span
from server.runner.loader import load_models

SHAPES = ((1, 1), (1, 2), (1, 5), (1, 8), (4, 1), (4, 5), (16, 1), (16, 5))
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
        f"{options.threads or torch.get_num_threads()} threads; past {options.past} tokens"
    )
    for pair in zip(plain, fast, strict=True):
        console.print(_table(pair, options.past, options.rounds))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.bench.forward")
    parser.add_argument("--config", type=Path, required=True, help="a configs/*.yaml")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--past", type=int, default=128, help="tokens before (%(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="of each shape (%(default)s)")
    return parser.parse_args(argv)


def _table(pair: tuple[ModelRunner, ModelRunner], past: int, rounds: int) -> Table:
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
        runner.forward(_batch(runner, _MAX_BATCH, 0, past, 0))
    for size, tokens in SHAPES:
        batches = [_batch(runner, size, past, tokens, tokens) for runner in pair]
        timings = [Timing() for _ in pair]
        for _ in range(max(3, rounds // size)):
            for runner, batch, timing in zip(pair, batches, timings, strict=True):
                timing.measure(runner, batch)
        cpu, wall = [t.cpu for t in timings], [t.wall for t in timings]
        table.add_row(str(size), str(tokens), *_cells(cpu), *_cells(wall))
    return table


def _cells(seconds: list[float]) -> tuple[str, ...]:
    before, after = seconds
    return f"{before * 1e3:.1f}", f"{after * 1e3:.1f}", f"{before / after:.2f}"


def _batch(runner: ModelRunner, size: int, past: int, tokens: int, num_kept: int) -> Batch:
    """`size` sequences, each feeding `tokens` tokens after `past`; pages lie in order."""
    width = runner.num_pages // _MAX_BATCH
    return Batch(
        tuple(
            Span(
                pages=range(1 + number * width, 1 + (number + 1) * width),
                num_past=past,
                token_ids=[(7919 * number + 31 * i) % runner.vocab_size for i in range(tokens)],
                num_kept=num_kept,
            )
            for number in range(size)
        )
    )


if __name__ == "__main__":
    main()

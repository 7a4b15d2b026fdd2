"""What a shortlist saves: a one-token forward with and without it, against the last model's.

    python -m server.bench.shortlist --config configs/default.yaml

A proposal costs the layers and the shortlist's rows of the head. When proposals are verified, the
whole head is applied to all of them in one product. Everything is measured in one process and in
turns; figures are the least CPU time of many rounds, of all threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from server.bench.machine import describe_machine, describe_versions
from server.config_file import load_config
from server.runner.base import Batch, ModelRunner, Span
from server.runner.loader import load_models

BATCHES = (1, 4, 16)
GAMMAS = (1, 2, 3, 4, 8)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table of milliseconds by batch."""
    options = _parse(argv)
    overrides = [
        f"engine.max_sequences={max(BATCHES)}",
        f"engine.max_length={options.past + 2}",
        f"engine.threads={options.threads}",
    ]
    *others, last = load_models(load_config(options.config, overrides)).runners
    listed = [runner for runner in others if runner.deferred is not None]
    if not listed:
        raise SystemExit(f"{options.config}: no model that proposes has a shortlist")
    machine, versions = describe_machine(), describe_versions()
    console = Console(width=max(Console().width, 100))
    console.print(
        f"{machine['cpu']}, torch {versions['torch']}, {options.threads} threads; "
        f"past {options.past} tokens"
    )
    for runner in listed:
        console.print(_table(runner, last, options.past, options.rounds))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.bench.shortlist")
    parser.add_argument("--config", type=Path, required=True, help="a configs/*.yaml")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--past", type=int, default=128, help="tokens before (%(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="of each batch (%(default)s)")
    return parser.parse_args(argv)


def _table(runner: ModelRunner, last: ModelRunner, past: int, rounds: int) -> Table:
    title = f"{runner.name} against {last.name}: CPU ms; whole head / shortlist"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("batch", last.name, "one token", "c", *(f"γ = {gamma}" for gamma in GAMMAS)):
        table.add_column(column, justify="right")
    for size in tqdm(BATCHES, desc=runner.name, leave=False):
        table.add_row(str(size), *_row(runner, last, size, past, rounds))
    return table


def _row(runner: ModelRunner, last: ModelRunner, size: int, past: int, rounds: int) -> list[str]:
    """Cells of one batch; those of γ compare γ proposals of each sequence and their scores."""
    head = runner.deferred
    assert head is not None
    batches = {r: _batch(r, size, past) for r in (runner, last)}
    states = torch.randn(size * max(GAMMAS), head.state_size, dtype=runner.dtype)
    work: dict[str | int, Callable[[], object]] = {
        "last": lambda: last.forward(batches[last]),
        "whole": lambda: runner.forward(batches[runner]),
        "short": lambda: head.shortlist_scores(head.states(batches[runner])),
    }
    for gamma in GAMMAS:
        work[gamma] = partial(head.scores, states[: size * gamma])
    ms = _least(work, rounds)
    cells = [_pair(gamma * ms["whole"], gamma * ms["short"] + ms[gamma]) for gamma in GAMMAS]
    ratios = f"{ms['whole'] / ms['last']:.3f} / {ms['short'] / ms['last']:.3f}"
    return [f"{ms['last']:.1f}", _pair(ms["whole"], ms["short"]), ratios, *cells]


def _pair(whole: float, short: float) -> str:
    return f"{whole:.1f} / {short:.1f}"


def _least(work: dict[str | int, Callable[[], object]], rounds: int) -> dict[str | int, float]:
    """Least CPU milliseconds of each; all are done in turns."""
    least = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, do in work.items():
            started = time.process_time()
            do()
            least[name] = min(least[name], (time.process_time() - started) * 1e3)
    return least


def _batch(runner: ModelRunner, size: int, past: int) -> Batch:
    """One token of each of `size` sequences; what their pages hold costs the same."""
    width = runner.num_pages // max(BATCHES)
    tables = [range(1 + i * width, 1 + (i + 1) * width) for i in range(size)]
    return Batch(tuple(Span(pages, past, [i + 1], 1) for i, pages in enumerate(tables)))


if __name__ == "__main__":
    main()

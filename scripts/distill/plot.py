"""`plot`: loss and acceptance over the training tokens, from the logs of one or more runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

from scripts.distill.train import LOG

SMOOTHING = 20  # steps averaged into a point of the training curves


@dataclass(slots=True)
class Curves:
    """Figures of one run by the number of tokens seen, in millions."""

    tokens: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    dev_tokens: list[float] = field(default_factory=list)
    dev_overlap: list[float] = field(default_factory=list)
    dev_agreement: list[float] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", help="folders made by `train`")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")


def run(options: argparse.Namespace) -> None:
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for folder in options.runs:
        curves = read_curves(folder / LOG)
        left.plot(curves.tokens, smooth(curves.loss), label=folder.name)
        right.plot(curves.dev_tokens, curves.dev_overlap, "o-", label=f"{folder.name}: β")
        right.plot(
            curves.dev_tokens, curves.dev_agreement, "s--", label=f"{folder.name}: greedy agreement"
        )
    left.set(xlabel="million tokens", ylabel="training loss", yscale="log")
    right.set(xlabel="million tokens", ylabel="held-out", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(options.out, dpi=110)


def read_curves(log: Path) -> Curves:
    """A resumed run repeats the steps after its last checkpoint: the later entry counts."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "loss" in row}
    tests = {row["step"]: row for row in rows if "dev_beta" in row}
    curves, total = Curves(), 0.0
    for step in sorted(steps):
        total += steps[step]["tokens"] / 1e6
        curves.tokens.append(total)
        curves.loss.append(steps[step]["loss"])
        if step in tests:
            curves.dev_tokens.append(total)
            curves.dev_overlap.append(tests[step]["dev_beta"])
            curves.dev_agreement.append(tests[step]["dev_agreement"])
    return curves


def smooth(values: list[float]) -> list[float]:
    """The mean of the last SMOOTHING values."""
    windows = [values[max(0, i - SMOOTHING + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]

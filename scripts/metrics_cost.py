"""What counting costs: python -m scripts.metrics_cost --config configs/default.yaml.

Decodes batches of prompts and compares the time that metrics take of each step with the step's own,
both by this thread's processor clock, so that other work on the machine matters little.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from scripts.check_speedup import Experiment, parse
from server.bench.strategy_spec import parse_strategies
from server.config_file import load_config
from server.core.stats import StepStats
from server.metrics import Metrics


class Meter:
    """Sums over steps, in seconds of the processor."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.steps = 0
        self.step_seconds = 0.0
        self.seconds = 0.0

    def add(self, stats: StepStats) -> None:
        started = time.thread_time()
        self._metrics.observe_step(stats)
        self.seconds += time.thread_time() - started
        self.step_seconds += stats.step_seconds
        self.steps += 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments, "scripts.metrics_cost")
    options.clock = "cpu"
    config = load_config(options.config)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"threads": 1})})
    experiment = Experiment(config, options)
    strategies = parse_strategies(options.strategies, None)
    table = Table("batch", "strategy", "steps", "ms/step", "µs of metrics", "share", box=None)
    for batch in (int(part) for part in options.batches.split(",")):
        for strategy in strategies:
            meter = Meter(Metrics(config))
            for _ in range(options.rounds):
                experiment.run(strategy, experiment.next_prompts(batch), meter)
            table.add_row(
                str(batch),
                strategy.label,
                str(meter.steps),
                f"{meter.step_seconds / meter.steps * 1e3:.1f}",
                f"{meter.seconds / meter.steps * 1e6:.0f}",
                f"{meter.seconds / meter.step_seconds:.2%}",
            )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

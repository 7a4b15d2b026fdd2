"""What a step of the engine costs besides its models: shares of CPU time by what was being done.

    python -m server.bench.overhead --config configs/default.yaml --batch 1 4 16 \
        --strategies standard,cos:gamma=1,auto

The engine runs in this process with everything a server gives it (prefix cache, controller, cost
table, metrics), on one thread, over texts of which none is reading its prompt any more. The parts
of a step are wrapped by stopwatches of this thread's processor clock, so that other work on the
machine hardly matters; what runs inside another part is charged to itself alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence as Row
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from server.bench.in_process import InProcessEngine
from server.bench.machine import describe_machine, describe_versions
from server.bench.prompts import load_prompts
from server.bench.strategy_spec import StrategySpec, parse_strategies
from server.config import ServerConfig
from server.config_file import load_config
from server.core.sampling_params import SamplingParams
from server.engine.engine import Engine

FORWARD, DECIDE, REST = "forwards", "verifying, drawing, proposing", "the rest"
STORE, PLAN, CACHE = "writing scores", "planning", "prefix cache"
TEXT, CONTROL, METRICS = "text", "controller and costs", "metrics"
OUTSIDE = (STORE, PLAN, CACHE, TEXT, CONTROL, METRICS, REST)


class Stopwatch:
    """Seconds by category; those of a part do not contain those of a part inside it."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.num_steps = 0
        self._clock = clock
        self._running: list[str] = []
        self._since = 0.0

    def wrap(self, owner: Any, name: str, category: str) -> None:
        """Charge calls of `owner.name` to `category` from now on."""
        inner = getattr(owner, name)

        @wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._charging(category):
                return inner(*args, **kwargs)

        setattr(owner, name, timed)

    def reset(self) -> None:
        """Forget all seconds."""
        self.seconds.clear()
        self.num_steps = 0

    @contextmanager
    def _charging(self, category: str) -> Iterator[None]:
        self._lap()
        self._running.append(category)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def _lap(self) -> None:
        now = self._clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def share(self, *categories: str) -> float:
        """Of all seconds."""
        return _share(self.seconds, categories)


def _share(seconds: Mapping[str, float], categories: Row[str]) -> float:
    return sum(seconds.get(name, 0.0) for name in categories) / sum(seconds.values())


class Workbench:
    """One engine as a server has it, with stopwatches on its parts."""

    def __init__(self, config: ServerConfig, prompts: Row[str]) -> None:
        self.stopwatch = Stopwatch()
        self._prompts = itertools.cycle(prompts)
        self._bench = InProcessEngine(config)
        self._engine = self._bench.engine
        self._wrap(self._engine)

    def _wrap(self, engine: Engine) -> None:
        wrap = self.stopwatch.wrap
        for runner in engine.runners:
            wrap(runner, "forward", FORWARD)
            for part in ("states", "scores", "shortlist_scores") if runner.deferred else ():
                wrap(runner.deferred, part, FORWARD)
        store = engine.scheduler._scores
        wrap(store, "write", STORE)
        wrap(store, "write_states", STORE)
        wrap(engine._advancer, "_decide", DECIDE)
        wrap(engine.scheduler, "plan", PLAN)
        wrap(engine.scheduler, "publish", CACHE)
        wrap(engine._outputs, "deliver", TEXT)
        wrap(engine.observer, "observe", CONTROL)
        wrap(engine.observer, "on_step", METRICS)
        wrap(engine, "step", REST)

    def run(self, strategy: StrategySpec, batch: int, params: SamplingParams) -> None:
        """Decode `batch` texts; only steps with all of them past their prompts are charged."""
        sequences = [self._bench.start(next(self._prompts), params, strategy) for _ in range(batch)]
        while not all(sequence.num_generated for sequence in sequences):
            if len(self._engine.scheduler.running) + len(self._engine.scheduler.waiting) < batch:
                raise SystemExit(f"a text of {params.max_tokens} tokens ended before all had begun")
            self._engine.step()
        self.stopwatch.reset()
        # A text that ends leaves a smaller batch behind.
        while len(self._engine.scheduler.running) == batch:
            self._engine.step()
            self.stopwatch.num_steps += 1
        for sequence in sequences:
            self._engine.abort(sequence.id)


def main(argv: Row[str] | None = None) -> None:
    """Print one row for each batch and strategy, as soon as it is measured."""
    options = _parse(argv)
    params = _params(options)
    overrides = [f"engine.max_sequences={max(options.batch)}", "engine.threads=1"]
    config = load_config(options.config, overrides)
    strategies = parse_strategies(options.strategies, None)
    machine, versions = describe_machine(), describe_versions()
    console = Console(width=max(Console().width, 100))
    console.print(
        f"{machine['cpu']}, torch {versions['torch']}, 1 thread, "
        f"{dict(options.sampling, temperature=options.temperature)}; calibrating ..."
    )
    workbench = Workbench(config, load_prompts(options.prompts).prompts)
    for batch in options.batch:
        spent: dict[str, dict[str, float]] = {}
        for strategy in strategies:
            workbench.run(strategy, batch, params)
            watch = workbench.stopwatch
            spent[strategy.label] = dict(watch.seconds)
            ms = sum(watch.seconds.values()) / watch.num_steps * 1e3
            console.print(
                f"batch {batch} {strategy.label}: {watch.num_steps} steps of {ms:.1f} ms, "
                f"outside {watch.share(*OUTSIDE):.1%}"
            )
        console.print(_table(batch, spent))


def _table(batch: int, spent: Mapping[str, Mapping[str, float]]) -> Table:
    title = f"batch {batch}: shares of CPU time"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for label in spent:
        table.add_column(label, justify="right")
    for name in (FORWARD, DECIDE, *OUTSIDE):
        table.add_row(name, *(_percent(seconds, name) for seconds in spent.values()))
    table.add_section()
    table.add_row("outside", *(_percent(seconds, *OUTSIDE) for seconds in spent.values()))
    return table


def _percent(seconds: Mapping[str, float], *names: str) -> str:
    return f"{_share(seconds, names):.1%}"


def _params(options: argparse.Namespace) -> SamplingParams:
    """Raises SystemExit where `--sampling` names what there is not."""
    common = {"max_tokens": options.tokens, "temperature": options.temperature}
    sampling = {name: _frozen(value) for name, value in options.sampling.items()}
    try:
        return SamplingParams(**common, **sampling)
    except TypeError as error:
        raise SystemExit(f"--sampling: {error}") from error


def _frozen(value: Any) -> Any:
    """Parameters are hashable, JSON's lists are not."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _parse(argv: Row[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.bench.overhead")
    add = parser.add_argument
    add("--config", type=Path, required=True, help="a configs/*.yaml")
    add("--batch", type=int, nargs="+", default=[1, 4, 16], help="texts at once (%(default)s)")
    add(
        "--strategies",
        default="standard,cos:gamma=1,auto",
        help="as those of cos-server bench (%(default)s)",
    )
    add("--tokens", type=int, default=40, help="of each text (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    add(
        "--sampling",
        type=json.loads,
        default={},
        help='more of the request, such as {"top_p": 0.9} or {"is_seeded": true}; '
        "names are those of core.sampling_params",
    )
    add("--prompts", default="humaneval", help="bundled name or file (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

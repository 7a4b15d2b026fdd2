"""How true the estimated speedup is: python -m scripts.check_speedup.

Decodes blocks of prompts under `standard` and other strategies in turn, on one engine, and compares
what its cost table estimates meanwhile with the ratio of seconds per token that the strategies
really took. Under `standard` the estimate ought to be 1, under another strategy that ratio.

With `--clock cpu` the seconds are those of this thread's processor: other work on the machine then
hardly disturbs the comparison; models run on one thread. `--clock wall` is what a server sees.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence as Row
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

from server.api.decoding import make_combination
from server.bench.prompts import load_prompts
from server.bench.strategy_spec import StrategySpec, parse_strategies
from server.config import ServerConfig, StrategyName
from server.config_file import load_config
from server.core.sampling_params import DecodingParams, SamplingParams, proposal_lengths
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine.calibration import calibrate
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.runner.loader import load_models

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.thread_time, "wall": time.perf_counter}


@dataclass(slots=True)
class Account:
    """Sums over steps, in seconds but for `num_tokens`, which are those after each text's first."""

    baseline: float = 0.0
    decode: float = 0.0
    num_tokens: int = 0

    def add(self, stats: StepStats) -> None:
        self.baseline += stats.baseline_seconds or 0.0
        self.decode += stats.decode_seconds
        self.num_tokens += sum(delivery.num_decoded for delivery in stats.deliveries)

    @property
    def estimated(self) -> float:
        return self.baseline / self.decode

    @property
    def token_seconds(self) -> float:
        return self.decode / self.num_tokens


class Observer(Protocol):
    def add(self, stats: StepStats) -> None: ...


class Experiment:
    """One engine, and prompts that never run out."""

    def __init__(self, config: ServerConfig, options: argparse.Namespace) -> None:
        loaded = load_models(config)
        self._options = options
        self._combination = make_combination(config.combination, len(config.models))
        self._tokenizer = loaded.tokenizer.backend_tokenizer
        self.engine = Engine(
            loaded.runners,
            self._tokenizer,
            loaded.eos_token_ids,
            EngineLimits(max_gamma=config.decoding.max_gamma),
            clock=CLOCKS[options.clock],
        )
        self.engine.observer.costs = calibrate(self.engine, self._combination)
        prompts = [prompt for name in options.prompts for prompt in load_prompts(name).prompts]
        self._prompts = itertools.cycle(prompts)
        self._numbers = itertools.count()

    def next_prompts(self, count: int) -> list[list[int]]:
        """Token ids."""
        texts = itertools.islice(self._prompts, count)
        return [self._tokenizer.encode(text).ids for text in texts]

    def run(self, strategy: StrategySpec, prompts: Row[list[int]], account: Observer) -> None:
        """Decode them together, to the end."""
        self.engine.observer.on_step = account.add
        for index, prompt in enumerate(prompts):
            self.engine.add(self._sequence(strategy, prompt, index))
        while self.engine.has_work:
            self.engine.step()

    def _sequence(self, strategy: StrategySpec, prompt: list[int], seed: int) -> Sequence:
        params = SamplingParams(
            # Not all alike, so that the batch thins out towards the end of a block.
            max_tokens=self._options.max_tokens - seed % 4,
            temperature=self._options.temperature,
            ignore_eos=True,
            seed=seed,
        )
        decoding = self._decoding(strategy)
        return Sequence.start(f"check-{next(self._numbers)}", prompt, params, decoding)

    def _decoding(self, strategy: StrategySpec) -> DecodingParams:
        asked = strategy.override
        name: StrategyName = asked["strategy"]
        gamma = asked.get("gamma", self._options.gamma)
        lengths = proposal_lengths(
            tuple(gamma) if isinstance(gamma, list) else gamma, self.engine.num_models
        )
        return DecodingParams(
            name,
            self._combination,
            lengths,
            asked.get("kappa", 0),
            asked.get("shared_coins", False),
        )


def measure(
    experiment: Experiment, strategies: Row[StrategySpec], batch: int, rounds: int
) -> list[Account]:
    """One account for each strategy; each round decodes the same prompts under all of them."""
    accounts = [Account() for _ in strategies]
    order = list(range(len(strategies)))
    for round in range(-1, rounds):
        prompts = experiment.next_prompts(batch)
        for index in order:
            # The first round warms up.
            account = accounts[index] if round >= 0 else Account()
            experiment.run(strategies[index], prompts, account)
        order.append(order.pop(0))
    return accounts


def rows(
    strategies: Row[StrategySpec], accounts: Row[Account], batch: int
) -> Iterator[tuple[str, str, str, str, str, str]]:
    standard = accounts[0]
    for strategy, account in zip(strategies, accounts, strict=True):
        measured = standard.token_seconds / account.token_seconds
        yield (
            str(batch),
            strategy.label,
            f"{account.token_seconds * 1e3:.1f}",
            f"{measured:.2f}",
            f"{account.estimated:.2f}",
            f"{account.estimated / measured - 1:+.1%}",
        )


def parse(arguments: Row[str] | None, name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {name}")
    add = parser.add_argument
    add("--config", type=Path, default=Path("configs/default.yaml"))
    add("--strategies", default="standard,cos", help="standard first (%(default)s)")
    add("--batches", default="1,4", help="sequences at once (%(default)s)")
    add("--rounds", type=int, default=6)
    add("--max-tokens", type=int, default=32)
    add("--gamma", type=int, default=1, help="where the strategy does not say (%(default)s)")
    add("--temperature", type=float, default=0.0)
    add("--prompts", nargs="+", default=["humaneval"])
    add("--clock", choices=CLOCKS, default="cpu")
    return parser.parse_args(arguments)


def main(arguments: Row[str] | None = None) -> int:
    options = parse(arguments, "scripts.check_speedup")
    config = load_config(options.config)
    if options.clock == "cpu":
        engine = config.engine.model_copy(update={"threads": 1})
        config = config.model_copy(update={"engine": engine})
    strategies = parse_strategies(options.strategies, None)
    experiment = Experiment(config, options)
    head = ("batch", "strategy", "ms/token", "measured", "estimated", "error")
    table = Table(*head, title=f"seconds of the {options.clock} clock")
    for batch in (int(part) for part in options.batches.split(",")):
        accounts = measure(experiment, strategies, batch, options.rounds)
        for row in rows(strategies, accounts, batch):
            table.add_row(*row)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What is sent in which order.

Machines drift: they heat up, and share their cores with others. So strategies are compared within
short rounds. A round is one block of prompts; every strategy runs that block, with the same seeds,
before the next round begins, and the order of the strategies rotates from round to round:

    round 0   standard(block 0)   cos(block 0)        mixture(block 0)
    round 1   cos(block 1)        mixture(block 1)    standard(block 1)
    ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from server.bench.prompts import PromptSet
from server.bench.settings import Settings
from server.bench.strategy_spec import StrategySpec

WARMUP_ROUND = -1
WARMUP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send."""

    prompt: str
    index: int
    seed: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Block:
    """Jobs of one strategy, sent together in a closed loop."""

    prompt_set: str
    concurrency: int
    round: int
    strategy: StrategySpec
    jobs: tuple[Job, ...]

    @property
    def is_warmup(self) -> bool:
        return self.round == WARMUP_ROUND


def plan(settings: Settings) -> list[Block]:
    """Every block of a run, in the order they are sent."""
    return [
        block
        for prompt_set in settings.prompt_sets
        for concurrency in settings.concurrency
        for block in _point(settings, prompt_set, concurrency)
    ]


def _point(settings: Settings, prompt_set: PromptSet, concurrency: int) -> Iterator[Block]:
    yield from _warmup(settings, prompt_set, concurrency)
    jobs = make_jobs(prompt_set, settings.num_prompts, settings.seed, settings.max_tokens)
    for round in range(settings.rounds):
        for strategy in rotated(settings.strategies, round):
            block_jobs = jobs[round :: settings.rounds]
            yield Block(prompt_set.name, concurrency, round, strategy, block_jobs)


def _warmup(settings: Settings, prompt_set: PromptSet, concurrency: int) -> Iterator[Block]:
    """Short requests from the end of the file, so that measured prompts are new to the server."""
    backwards = PromptSet(prompt_set.name, prompt_set.prompts[::-1])
    count = settings.warmup * concurrency
    max_tokens = min(settings.max_tokens, WARMUP_TOKENS)
    jobs = make_jobs(backwards, count, settings.seed + settings.num_prompts, max_tokens)
    for strategy in settings.strategies if jobs else ():
        yield Block(prompt_set.name, concurrency, WARMUP_ROUND, strategy, jobs)


def make_jobs(prompt_set: PromptSet, count: int, seed: int, max_tokens: int) -> tuple[Job, ...]:
    """`count` jobs; a file that is too short is used again, with other seeds."""
    prompts = prompt_set.prompts
    return tuple(Job(prompts[i % len(prompts)], i, seed + i, max_tokens) for i in range(count))


def rotated(strategies: tuple[StrategySpec, ...], round: int) -> tuple[StrategySpec, ...]:
    """Over the rounds, each strategy comes first, second, ... equally often."""
    shift = round % len(strategies)
    return strategies[shift:] + strategies[:shift]

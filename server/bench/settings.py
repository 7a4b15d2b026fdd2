"""What one run of the benchmark measures, with which load."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from server.bench.prompts import PromptSet
from server.bench.strategy_spec import StrategySpec


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of a run, parsed.

    Attributes:
        prompt_sets: each is measured on its own.
        num_prompts: requests of each point (prompt set, concurrency, strategy).
        concurrency: numbers of requests kept in flight; each is a point.
        rounds: blocks the prompts are dealt into; every strategy runs every block.
        max_tokens, temperature, seed, ignore_eos: of every request; the n-th prompt has
            seed + n, the same under every strategy.
        send_seeds: send those seeds; without one the server draws its own, and may share coins.
        warmup: waves of `concurrency` short requests that each strategy of a point sends first
            and that are not counted.
        body: further fields of every request, as response_format.
    """

    prompt_sets: tuple[PromptSet, ...]
    strategies: tuple[StrategySpec, ...]
    concurrency: tuple[int, ...]
    num_prompts: int
    rounds: int
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
    warmup: int
    send_seeds: bool = True
    body: dict[str, Any] = field(default_factory=dict)

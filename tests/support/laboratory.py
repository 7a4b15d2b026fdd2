"""A closed loop of clients around the real engine, on a clock that only models move.

Forwards take seconds by the rows that they compute, the rest of a step by what it decides, and
models agree as often as a test says. So what a strategy takes is a figure without noise, and what
`auto` takes can be held against it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence as Row
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine.calibration import calibrate
from server.engine.cost_table import CostTable
from server.engine.engine import Engine
from server.engine.limits import EngineLimits
from server.engine.outcome import Flight, Outcome
from server.runner.base import Batch
from tests.support.table_lm import DigitDecoder

CONTRASTIVE = Combination.contrastive(2, 0.1)
_VOCAB = 512
_PAGE = 16


class Clock:
    """Stands still unless somebody moves it, at the machine's speed of the moment.

    Attributes:
        now: what the engine reads.
        work: seconds that the same would have taken at the machine's full speed.
    """

    def __init__(self, slowness: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now = 0.0
        self.work = 0.0
        self._slowness = slowness

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.work += seconds
        self.now += seconds * self._slowness(self.now)


def drifting(seed: int = 0, noise: float = 0.15) -> Clock:
    """A shared machine: its speed changes within minutes, steps scatter, and some stall."""
    rng = random.Random(seed)
    phase = rng.uniform(0, 100)
    levels = [rng.uniform(0.7, 1.6) for _ in range(1000)]

    def slowness(now: float) -> float:
        wave = 1 + 0.15 * math.sin((now + phase) / 9.0)
        level = levels[int((now + phase) / 30.0) % len(levels)]
        stall = 5.0 if rng.random() < 0.01 else 1.0
        return wave * level * stall * math.exp(rng.gauss(0, noise))

    return Clock(slowness)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a forward: by rows, between and beyond points; prompts' rows have no head."""

    rows: tuple[float, ...]
    seconds: tuple[float, ...]
    beyond: float  # of each row more
    prompt_row: float

    def __call__(self, num_kept: int, num_prompt: int) -> float:
        over = max(0.0, num_kept - self.rows[-1])
        decoding = float(np.interp(num_kept, self.rows, self.seconds)) + over * self.beyond
        return decoding + num_prompt * self.prompt_row


# One thread: nearly flat up to four rows, bound by arithmetic from sixteen on.
PROPOSER = Cost((1, 4, 16), (0.0101, 0.0134, 0.0343), 0.0013, 0.0008)
EXPERT = Cost((1, 4, 16), (0.0234, 0.0318, 0.0838), 0.0030, 0.0024)
REST = 0.0004  # of a step, and half as much of each position that it decides


class AgreeingRunner:
    """A ModelRunner whose greedy token is the contrast's with a given probability.

    The contrast's token of a position is a function of the text's first token and the position.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    vocab_size = _VOCAB
    max_length = 2048
    page_size = _PAGE
    num_pages = 4096
    deferred = None
    gathers = True

    def __init__(self, index: int, clock: Clock, cost: Cost, acceptance: Row[float]) -> None:
        self.name = ("proposer", "expert")[index]
        self._index = index
        self._clock = clock
        self._cost = cost
        self._acceptance = acceptance
        self._texts = np.zeros(self.num_pages, dtype=np.int64)

    def forward(self, batch: Batch) -> Tensor:
        kept = [span.num_kept for span in batch.spans]
        self._clock.spend(self._cost(sum(kept), batch.num_tokens - sum(kept)))
        logits = torch.zeros(sum(kept), _VOCAB)
        row = 0
        for span in batch.spans:
            if span.num_past == 0:
                self._texts[span.pages[0]] = span.token_ids[0]
            text = int(self._texts[span.pages[0]])
            end = span.num_past + len(span.token_ids)
            for position in range(end - span.num_kept + 1, end + 1):
                self._fill(logits[row], text, position)
                row += 1
        return logits

    def _fill(self, row: Tensor, text: int, position: int) -> None:
        rng = random.Random(text * 4096 + position)
        target, lure, other = rng.sample(range(_VOCAB), 3)
        is_lured = rng.random() >= self._acceptance[1]
        proposer_agrees = rng.random() < self._acceptance[0]
        if self._index == 1:
            row[target] = 10.0
            row[lure] = 10.1 if is_lured else 0.0
        else:
            # What the proposer favours, the contrast lowers.
            row[lure] = 2.0 if is_lured else 0.0
            row[target if proposer_agrees and not is_lured else other] = 3.0


class RunsMatcher:
    """A `Matcher` that leaves no choice about runs of tokens, at places that a seed names."""

    error = None

    def __init__(self, seed: int, runs: float, run_length: int) -> None:
        """A token is followed with probability `runs` by `run_length` forced ones."""
        rng = random.Random(seed)
        self._forced = [False]
        while len(self._forced) < 4096:
            self._forced += [True] * run_length if rng.random() < runs else []
            self._forced.append(False)
        self._all = bytes([255]) * (_VOCAB // 8)
        self._one = bytes([2]) + bytes(_VOCAB // 8 - 1)

    def mask(self, generated: Row[int]) -> bytes:
        return self._one if self._forced[len(generated)] else self._all

    def end(self, generated: Row[int]) -> int | None:
        return None


@dataclass(frozen=True, slots=True)
class Load:
    """What clients send: so many at a time, prompts and answers of these lengths.

    With `runs`, texts follow a grammar; see `RunsMatcher`.
    """

    concurrency: int
    num_requests: int
    prompt: tuple[int, int] = (100, 200)
    answer: tuple[int, int] = (48, 48)
    temperature: float = 0.0
    is_seeded: bool = True
    runs: float = 0.0
    run_length: int = 3


@dataclass(slots=True)
class Measured:
    """Of a run: seconds of work, tokens, and every step."""

    seconds: float
    num_tokens: int
    steps: list[StepStats] = field(default_factory=list)

    @property
    def token_seconds(self) -> float:
        return self.seconds / self.num_tokens

    @property
    def decode_token_seconds(self) -> float:
        """Of steps that read no prompt; by the engine's clock."""
        steps = [step for step in self.steps if not step.num_prefill_tokens]
        num_tokens = sum(d.num_decoded for step in steps for d in step.deliveries)
        return sum(step.step_seconds for step in steps) / num_tokens

    @property
    def estimated(self) -> float:
        """Speedup over standard decoding, as the server's metrics have it."""
        decode = sum(step.decode_seconds for step in self.steps)
        return sum(step.baseline_seconds or 0.0 for step in self.steps) / decode

    @property
    def used(self) -> dict[str, float]:
        """Share of tokens by strategy and lengths."""
        counts: dict[str, int] = {}
        for step in self.steps:
            for delivery in step.deliveries:
                how = delivery.decoding
                name: str = how.strategy
                if name in ("cos", "speculative"):
                    name += "-" + "/".join(str(length) for length in how.gamma)
                counts[name] = counts.get(name, 0) + delivery.num_tokens
        total = sum(counts.values())
        return {name: count / total for name, count in sorted(counts.items(), key=lambda c: -c[1])}


class Laboratory:
    """One engine, calibrated and controlled as a server's is; loads run on it one by one."""

    def __init__(
        self,
        acceptance: Row[float] = (0.5, 0.95),
        costs: Row[Cost] = (PROPOSER, EXPERT),
        rest: float = REST,
        clock: Clock | None = None,
        mistimed: int | None = None,
        dearer: float = 1.0,
    ) -> None:
        """Make an idle engine.

        Args:
            acceptance: of proposals of each model.
            costs: of each model's forwards.
            rest: seconds of a step, and half as many of each position that it decides.
            clock: what the engine reads.
            mistimed: seeds errors of a quarter in what was timed at start; None has none.
            dearer: times what forwards of several tokens take, they were timed at start.
        """
        self.clock = clock or Clock()
        runners = [AgreeingRunner(k, self.clock, cost, acceptance) for k, cost in enumerate(costs)]
        limits = EngineLimits(max_prefill_tokens=128)
        self.engine = Engine(runners, DigitDecoder(), frozenset(), limits, clock=self.clock)
        self._charge_decisions(rest)
        table = calibrate(self.engine, CONTRASTIVE)
        assert table is not None
        table = _with_dearer_spans(table, dearer)
        self.engine.control(table if mistimed is None else _mistimed(table, mistimed))
        self._num_started = 0

    def run(self, load: Load, decoding: DecodingParams, seed: int = 0) -> Measured:
        """Keep `load.concurrency` requests in flight until all are answered."""
        steps: list[StepStats] = []
        self.engine.observer.on_step = steps.append
        rng = random.Random(seed)
        left = load.num_requests
        started = self.clock.work
        num_tokens = 0
        for _ in range(min(left, load.concurrency)):
            self.send(load, decoding, rng)
            left -= 1
        while self.engine.has_work:
            for delta in self.engine.step():
                num_tokens += len(delta.token_ids)
                if delta.finish_reason is not None and left:
                    self.send(load, decoding, rng)
                    left -= 1
        self.engine.observer.on_step = None
        return Measured(self.clock.work - started, num_tokens, steps)

    def send(self, load: Load, decoding: DecodingParams, rng: random.Random) -> None:
        """One request more, of those lengths."""
        number = self._num_started
        self._num_started += 1
        name = rng.randrange(_VOCAB)
        prompt = [name, *[1] * (rng.randint(*load.prompt) - 1)]
        params = SamplingParams(
            max_tokens=rng.randint(*load.answer),
            temperature=load.temperature,
            seed=name,
            is_seeded=load.is_seeded,
            prefix_cache=False,
        )
        matcher = RunsMatcher(name, load.runs, load.run_length) if load.runs else None
        self.engine.add(Sequence.start(f"text-{number}", prompt, params, decoding, matcher=matcher))

    def _charge_decisions(self, rest: float) -> None:
        land = self.engine._advancer.land

        def charged(flight: Flight) -> Outcome:
            outcome = land(flight)
            stats = outcome.stats
            decided = stats.num_drawn + sum(stats.tails) + stats.num_proposed
            self.clock.spend(rest * (1 + decided / 2))
            return outcome

        self.engine._advancer.land = charged  # type: ignore[method-assign]


def _with_dearer_spans(table: CostTable, dearer: float) -> CostTable:
    spans = tuple(
        {(batch, tokens): t * (dearer if tokens > 1 else 1) for (batch, tokens), t in found.items()}
        for found in table.timings.span_seconds
    )
    return CostTable(replace(table.timings, span_seconds=spans))


def _mistimed(table: CostTable, seed: int) -> CostTable:
    rng = random.Random(seed)

    def wrong(seconds: float) -> float:
        return seconds * math.exp(rng.gauss(0, 0.25))

    timings = table.timings
    return CostTable(
        replace(
            timings,
            forward_seconds=tuple(
                tuple(accumulate(map(wrong, row), max)) for row in timings.forward_seconds
            ),
            span_seconds=tuple(
                {shape: wrong(seconds) for shape, seconds in found.items()}
                for found in timings.span_seconds
            ),
        )
    )

"""What standard decoding costs here: the other side of the estimated speedup.

A *round* gives each of `batch` sequences one token the plain way: one forward of one token by every
scorer, then combining, drawing and text. Rounds are timed on the engine that will serve, with its
own pages, before anybody waits for it, and the same clocks then time real decoding.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence as Row
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import Delivery, StepStats
from server.engine.engine import Engine

logger = logging.getLogger(__name__)

# Tokens before the timed ones: what a chat or a completion typically stands on.
_CONTEXT = 128
_ROUNDS = 5  # the first of them warms up
# Twice as many sequences are tried only while that is likely to stay within this.
_BUDGET_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Baseline:
    """Seconds of a round by number of sequences.

    Attributes:
        batches: numbers of sequences that were timed, ascending.
        forward_seconds: [num_models][len(batches)], a forward of one token of each sequence.
        rest_seconds: [len(batches)], everything else of a round.
    """

    batches: tuple[int, ...]
    forward_seconds: tuple[tuple[float, ...], ...]
    rest_seconds: tuple[float, ...]

    def token_seconds(self, scorers: Row[int], batch: int) -> float:
        """One token of one sequence, when `batch` of them decode at once."""
        curves = [self.forward_seconds[model] for model in scorers]
        curves.append(self.rest_seconds)
        return sum(_interpolate(self.batches, curve, batch) for curve in curves) / batch

    def estimate(self, deliveries: Row[Delivery], batch: int) -> float:
        """Standard decoding of what was delivered, `batch` sequences decoding at once."""
        num_tokens: dict[tuple[int, ...], int] = {}
        for delivery in deliveries:
            scorers = delivery.decoding.combination.scorers
            num_tokens[scorers] = num_tokens.get(scorers, 0) + delivery.num_decoded
        return sum(
            count * self.token_seconds(scorers, max(1, batch))
            for scorers, count in num_tokens.items()
        )


def _interpolate(xs: Row[int], ys: Row[float], x: int) -> float:
    """Linear between the points and beyond the last; below the first, the first."""
    if len(xs) == 1 or x <= xs[0]:
        return ys[0]
    right = min(bisect_left(xs, x), len(xs) - 1)
    left = right - 1
    slope = (ys[right] - ys[left]) / (xs[right] - xs[left])
    return ys[left] + slope * (x - xs[left])


def calibrate(engine: Engine, combination: Combination) -> Baseline | None:
    """Time rounds of `combination`, and forwards of the models it does not need.

    Returns:
        None where nothing could be timed: no memory for a single sequence, or scores that are no
        distribution.
    """
    started = engine.clock()
    on_step, engine.on_step = engine.on_step, None
    points: dict[int, _Point] = {}
    try:
        for batch in _batches(engine):
            before = engine.clock()
            point = _time_batch(engine, combination, batch)
            if point is None:
                break
            points[batch] = point
            logger.info("timed standard decoding, %d at once: %s", batch, point)
            # Doubling the batch at most doubles its time.
            now = engine.clock()
            if now - started + 2 * (now - before) > _BUDGET_SECONDS:
                break
    finally:
        engine.on_step = on_step
    if not points:
        logger.warning("standard decoding could not be timed; no speedup will be estimated")
        return None
    return _baseline(points, engine.num_models)


@dataclass(slots=True)
class _Point:
    """Steps of one batch size, by model: [(forward seconds, the rest of the step)]."""

    steps: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, stats: StepStats) -> None:
        rest = stats.step_seconds - stats.forward_seconds
        self.steps.setdefault(stats.model, []).append((stats.forward_seconds, rest))

    def forward_seconds(self, model: int) -> float:
        return median(forward for forward, _ in self.steps[model])

    def rest_seconds(self, model: int) -> float:
        return median(rest for _, rest in self.steps[model])

    def __str__(self) -> str:
        each = (f"model {k} {self.forward_seconds(k) * 1e3:.1f} ms" for k in sorted(self.steps))
        return ", ".join(each)


def _baseline(points: dict[int, _Point], num_models: int) -> Baseline:
    return Baseline(
        batches=tuple(points),
        forward_seconds=tuple(
            _rising(point.forward_seconds(model) for point in points.values())
            for model in range(num_models)
        ),
        rest_seconds=_rising(
            sum(point.rest_seconds(model) for model in point.steps) for point in points.values()
        ),
    )


def _rising(seconds: Iterable[float]) -> tuple[float, ...]:
    """More sequences never cost less; noise that says so would be extrapolated below zero."""
    return tuple(accumulate(seconds, max))


def _batches(engine: Engine) -> Iterator[int]:
    """1, 2, 4, ... as far as the engine takes them and its pages hold them."""
    if engine.max_length < _num_context(engine) + _ROUNDS + 1:
        return
    num_tokens = _num_context(engine) + _ROUNDS + 2
    limit = engine.scheduler.num_fitting(num_tokens)
    batch = 1
    while batch <= min(limit, engine.limits.max_sequences):
        yield batch
        batch *= 2


def _num_context(engine: Engine) -> int:
    return max(1, min(_CONTEXT, engine.max_length - _ROUNDS - 2))


def _time_batch(engine: Engine, combination: Combination, batch: int) -> _Point | None:
    point = _run(engine, combination, batch)
    if point is None:
        return None
    for model in set(range(engine.num_models)).difference(combination.scorers):
        alone = _run(engine, Combination.only(engine.num_models, model), batch)
        if alone is None:
            return None
        # A round of the combination pays nothing for it but where a request's own needs it.
        point.steps[model] = [(forward, 0.0) for forward, _ in alone.steps[model]]
    return point


def _run(engine: Engine, combination: Combination, batch: int) -> _Point | None:
    """Decode `batch` texts together; None where that fails."""
    steps: list[StepStats] = []
    engine.on_step = steps.append
    for index in range(batch):
        engine.add(_sequence(engine, combination, index))
    has_failed = False
    while engine.has_work:
        has_failed |= any(delta.finish_reason == "error" for delta in engine.step())
    point = _Point()
    rounds = [stats for stats in steps if stats.num_decoding == stats.num_sequences == batch]
    for stats in rounds[len(combination.scorers) :]:
        point.add(stats)
    return None if has_failed or set(point.steps) != set(combination.scorers) else point


def _sequence(engine: Engine, combination: Combination, index: int) -> Sequence:
    """One whose context counts as read: what its pages hold costs a forward the same."""
    num_context = _num_context(engine)
    prompt = [(index + place) % engine.vocab_size for place in range(num_context)]
    # The first token comes with the prompt, the others in rounds.
    params = SamplingParams(max_tokens=_ROUNDS + 1, ignore_eos=True, seed=index)
    decoding = DecodingParams("standard", combination, (1,) * engine.num_models)
    sequence = Sequence.start(f"calibration-{index}", prompt, params, decoding)
    sequence.num_seen = [num_context - 1] * engine.num_models
    return sequence

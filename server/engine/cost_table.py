"""What decoding costs on this machine, now: seconds of a forward, and of the rest of a step.

`calibration` times forwards at start; every step of real decoding then corrects the table. A
machine's load slows all batch sizes alike, so each model has one factor that follows the last
seconds, and each kind of forward a slow one of its own for what the first timing missed. Both are
ratios of sums of seconds, so estimates add up to what was measured, outliers included.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence as Row
from dataclasses import dataclass
from itertools import accumulate

from server.core.stats import Delivery, StepStats

# Seconds of forwards after which a ratio has forgotten 63 % of what came before.
_SCALE_MEMORY = 3.0
_CELL_MEMORY = 20.0
_SCALE_PRIOR = 0.05  # seconds of forwards that the other models' load counts for
_CELL_PRIOR = 1.0  # seconds of forwards that the first timing counts for
_CELL_RANGE = (0.7, 1.5)
_MAX_KNOWN = 4096
_OUTLIER = 4.0  # one step counts for at most so many times what was expected

# How the rest of a step that verifies, or proposes, compares with that of one that draws, until
# there are steps to tell.
_VERIFY_FACTOR = 1.5
_PROPOSE_FACTOR = 0.7


@dataclass(frozen=True, slots=True)
class Timings:
    """What calibration has measured, in seconds.

    Attributes:
        batches: numbers of sequences that were timed, ascending.
        forward_seconds: [num_models][len(batches)], a forward of one token of each sequence.
        feed_seconds: [len(batches)], the rest of a step that decides nothing.
        draw_seconds: [len(batches)], the rest of a step that draws a token for each sequence.
        num_scorers: of the combination that was timed.
        span_seconds: [num_models] of {(batch, tokens): seconds} of forwards alone, `tokens` tokens
            of each sequence, all of them scored; one token among them.
    """

    batches: tuple[int, ...]
    forward_seconds: tuple[tuple[float, ...], ...]
    feed_seconds: tuple[float, ...]
    draw_seconds: tuple[float, ...]
    num_scorers: int = 1
    span_seconds: tuple[dict[tuple[int, int], float], ...] = ()

    @property
    def rest_seconds(self) -> tuple[float, ...]:
        """[len(batches)], everything but forwards of a round of standard decoding."""
        return tuple(
            (self.num_scorers - 1) * feed + draw
            for feed, draw in zip(self.feed_seconds, self.draw_seconds, strict=True)
        )


class Ratio:
    """Measured over expected seconds; old ones are forgotten."""

    def __init__(self, memory: float, prior: float) -> None:
        """`memory` and `prior` in expected seconds; the prior ratio weighs `prior`."""
        self._memory = memory
        self._prior = prior
        self._measured = 0.0
        self._expected = 0.0

    def value(self, prior: float = 1.0) -> float:
        """The ratio, drawn towards `prior` while little was seen."""
        weight = self._prior
        return (self._measured + weight * prior) / (self._expected + weight)

    def forget(self, share: float) -> None:
        """Weigh what was seen so far by 1 - share."""
        self._measured *= 1 - share
        self._expected *= 1 - share

    def add(self, measured: float, expected: float) -> None:
        """One step more."""
        if expected <= 0:
            return
        measured = min(measured, _OUTLIER * expected * max(1.0, self.value()))
        kept = math.exp(-expected / self._memory)
        self._measured = self._measured * kept + measured
        self._expected = self._expected * kept + expected


class CostTable:
    """Seconds of forwards and of steps; read and corrected on the engine thread."""

    def __init__(self, timings: Timings) -> None:
        self.timings = timings
        num_models = len(timings.forward_seconds)
        self._common = Ratio(_SCALE_MEMORY, _SCALE_PRIOR)
        self._scales = [Ratio(_SCALE_MEMORY, _SCALE_PRIOR) for _ in range(num_models)]
        self._cells: dict[tuple[int, int, int], Ratio] = {}
        self._rest_scale = Ratio(_SCALE_MEMORY / 10, _SCALE_PRIOR / 10)
        self._rest_factors = {
            "draw": Ratio(_CELL_MEMORY / 10, _CELL_PRIOR / 10),
            "verify": Ratio(_CELL_MEMORY / 10, _CELL_PRIOR / 10),
            "propose": Ratio(_CELL_MEMORY / 10, _CELL_PRIOR / 10),
        }
        self._extras = [self._measure_extras(model) for model in range(num_models)]
        self._known: dict[tuple[int, float, float], float] = {}

    def load(self, model: int) -> float:
        """How much slower the model's forwards are now than when they were timed."""
        return self._scales[model].value(self._common.value())

    def forward_seconds(self, model: int, batch: float, tokens: float) -> float:
        """One forward of `tokens` tokens of each of `batch` sequences, all of them scored."""
        seconds = self._timed(model, batch, tokens) * self.load(model)
        return seconds * self._cell(model, batch, tokens)

    def rest_seconds(
        self,
        batch: float,
        num_drawn: float = 0,
        num_verified: float = 0,
        num_proposed: float = 0,
    ) -> float:
        """The rest of a step of `batch` sequences: positions drawn, verified and proposed."""
        return self._rest_scale.value() * sum(
            self._rest_part(kind, rows)
            for kind, rows in (
                ("feed", batch),
                ("draw", num_drawn),
                ("verify", num_verified),
                ("propose", num_proposed),
            )
            if rows > 0
        )

    def token_seconds(self, scorers: Row[int], batch: int) -> float:
        """One token of one sequence by standard decoding, when `batch` of them decode at once."""
        forwards = sum(self.forward_seconds(model, batch, 1) for model in scorers)
        feed = self._rest_scale.value() * self._rest_part("feed", batch) * (len(scorers) - 1)
        return (forwards + feed + self.rest_seconds(batch, num_drawn=batch)) / batch

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

    def prefill_seconds(self, stats: StepStats) -> float:
        """What prompts added to a step: all that it took above decoding alone.

        By share of tokens it would be nearly all of it, though the decoding in the same step would
        have had to read the same weights without them.
        """
        if not stats.num_prefill_tokens:
            return 0.0
        batch = stats.num_decoding
        if not batch:
            return stats.step_seconds
        tokens = (stats.num_tokens - stats.num_prefill_tokens) / batch
        alone = self.forward_seconds(stats.model, batch, tokens)
        rest = (stats.step_seconds - stats.forward_seconds) * (1 - batch / stats.num_sequences)
        return max(0.0, stats.forward_seconds - alone) + rest

    def observe(self, stats: StepStats) -> None:
        """Learn from one step; those that read prompts say nothing about decoding."""
        if stats.num_prefill_tokens or not stats.num_sequences:
            return
        model, batch = stats.model, stats.num_sequences
        tokens = stats.num_tokens / batch
        timed = self._timed(model, batch, tokens)
        cell = self._cell(model, batch, tokens)
        self._common.add(stats.forward_seconds, timed * cell)
        self._scales[model].add(stats.forward_seconds, timed * cell)
        self._cell_ratio(model, batch, tokens).add(stats.forward_seconds, timed * self.load(model))
        self._observe_rest(stats)

    def _observe_rest(self, stats: StepStats) -> None:
        parts = {
            "draw": self._rest_part("draw", stats.num_drawn),
            "verify": self._rest_part("verify", sum(stats.tails)),
            "propose": self._rest_part("propose", stats.num_proposed),
        }
        feed = self._rest_part("feed", stats.num_sequences)
        expected = feed + sum(parts.values())
        rest = stats.step_seconds - stats.forward_seconds
        scale = self._rest_scale.value()
        self._rest_scale.add(rest, expected)
        if expected <= 0:
            return
        # What each kind of work took is not known apart; its share is blamed.
        for kind, part in parts.items():
            factor = self._rest_factors[kind]
            factor.add(rest * part / expected, part * scale / max(1e-9, factor.value()))

    def _rest_part(self, kind: str, rows: float) -> float:
        """Seconds at the load of the first timing."""
        if rows <= 0:
            return 0.0
        feed = _interpolate(self.timings.batches, self.timings.feed_seconds, rows)
        if kind == "feed":
            return feed
        draw = _interpolate(self.timings.batches, self.timings.draw_seconds, rows)
        first = {"draw": 1.0, "verify": _VERIFY_FACTOR, "propose": _PROPOSE_FACTOR}[kind]
        factor = min(4.0, max(0.25, self._rest_factors[kind].value()))
        return max(0.0, draw - feed) * first * factor

    def _timed(self, model: int, batch: float, tokens: float) -> float:
        """As measured at start, between and beyond what was measured."""
        key = (model, batch, tokens)
        if key not in self._known:
            if len(self._known) > _MAX_KNOWN:
                self._known.clear()
            self._known[key] = self._timed_one(model, batch) + self._extra(model, batch, tokens - 1)
        return self._known[key]

    def _extra(self, model: int, batch: float, more: float) -> float:
        """What `more` tokens of each sequence add to a forward of one."""
        curves = self._extras[model]
        if not curves or more <= 0:
            return 0.0
        added = [_extrapolate(curve, batch) for curve in curves.values()]
        # Twice the tokens never add less.
        return _interpolate((0, *curves), (0.0, *accumulate(added, max)), more)

    def _measure_extras(self, model: int) -> dict[int, dict[int, float]]:
        """{tokens above one: {batch: seconds above a forward of one}}, both ascending."""
        curves: dict[int, dict[int, float]] = {}
        if self.timings.span_seconds:
            found = self.timings.span_seconds[model]
            for batch, tokens in sorted(found, key=lambda shape: shape[::-1]):
                if tokens > 1:
                    added = max(0.0, found[batch, tokens] - found[batch, 1])
                    curves.setdefault(tokens - 1, {})[batch] = added
        return curves

    def _timed_one(self, model: int, batch: float) -> float:
        return _interpolate(self.timings.batches, self.timings.forward_seconds[model], batch)

    def _cell(self, model: int, batch: float, tokens: float) -> float:
        ratio = self._cells.get(_cell_key(model, batch, tokens))
        low, high = _CELL_RANGE
        return 1.0 if ratio is None else min(high, max(low, ratio.value()))

    def _cell_ratio(self, model: int, batch: float, tokens: float) -> Ratio:
        key = _cell_key(model, batch, tokens)
        return self._cells.setdefault(key, Ratio(_CELL_MEMORY, _CELL_PRIOR))


def _cell_key(model: int, batch: float, tokens: float) -> tuple[int, int, int]:
    """Forwards of about the same shape: powers of two of sequences and of tokens."""
    return model, round(math.log2(max(1.0, batch))), round(math.log2(max(1.0, tokens)))


def _extrapolate(curve: dict[int, float], batch: float) -> float:
    """Between the points; beyond the last in proportion, as rows cost a machine that is full."""
    last = max(curve)
    if batch > last:
        return curve[last] * batch / last
    return _interpolate(tuple(curve), tuple(accumulate(curve.values(), max)), batch)


def _interpolate(xs: Row[float], ys: Row[float], x: float) -> float:
    """Linear between the points and beyond the last; below the first, the first."""
    if len(xs) == 1 or x <= xs[0]:
        return ys[0]
    right = min(bisect_left(xs, x), len(xs) - 1)
    left = right - 1
    slope = (ys[right] - ys[left]) / (xs[right] - xs[left])
    return ys[left] + slope * (x - xs[left])

"""What decoding costs on this machine, now: seconds of a forward, and of the rest of a step.

`calibration` times forwards at start; every step of real decoding then corrects the table. What a
forward takes is its first timing, and what texts longer than those add to it, times factors: the
machine's speed, which changes within seconds and slows every shape alike; the model's; what the
first timing missed for so many sequences; and, for several tokens of each, what it missed for
these (`factors`). One way of decoding is compared with another by what both took when they took
turns, not by how fast the machine was at the time.

Estimates of standard decoding are multiplied by measured over expected seconds of the last steps,
whatever these were: they add up to what was measured, outliers included, and do not depend on when
the machine was timed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence as Row
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from server.core.stats import Delivery, StepStats
from server.engine.bounded import MAX_KEPT, make_room
from server.engine.factors import Factors

# Seconds of steps after which measured over expected ones has forgotten 63 % of what came before.
_CHARGE_MEMORY = 1.0
_CHARGE_PRIOR = 0.05
_REST_MEMORY = 2.0
_REST_PRIOR = 0.1
_OUTLIER = 4.0  # one step counts for at most so many times what was expected

# Factors are known to these relative deviations; variances are the squares.
_NOISE = 0.1  # of one step
_SURPRISE = 3.0  # deviations that one step counts for at most
_MACHINE = 0.3  # not seen for long; drifts by 0.04 in a second
_MODEL = 0.03
# Forwards of one token of each sequence, as first timed; enough for the controller to have them
# done before it trusts them.
_TIMED = 0.075
_ROUND = 0.1  # those not seen for long
_SHAPE = 0.1  # those of more, beside them
MOST_DOUBT = max(_TIMED, _ROUND, _SHAPE)
# Seconds of steps until 63 % of what was learnt is forgotten, if not seen again: how fast a machine
# is may change at any time; what several tokens cost beside one lies in its kernels.
_MEMORY = 120.0
_SHAPE_MEMORY = 1200.0

Name = tuple[int, ...]  # of a factor
_MACHINE_NAME: Name = ()

_ABOUT_ONE = 1.05  # tokens of each sequence in a step of standard decoding, at most

_LEAST = 0.25  # of its first timing, that a forward over shorter sequences takes

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
        context: tokens of each sequence before those that were timed.
        past_seconds: [num_models] of (seconds that a forward of one token takes longer for each
            token before it, and the same for each token more that it feeds).
    """

    batches: tuple[int, ...]
    forward_seconds: tuple[tuple[float, ...], ...]
    feed_seconds: tuple[float, ...]
    draw_seconds: tuple[float, ...]
    num_scorers: int = 1
    span_seconds: tuple[dict[tuple[int, int], float], ...] = ()
    context: int = 0
    past_seconds: tuple[tuple[float, float], ...] = ()

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


@dataclass(frozen=True, slots=True)
class _Context:
    """Tokens that decoding sequences stand on.

    Attributes:
        own: of each of them.
        shared: that all begin with, and that are attended once.
    """

    own: float
    shared: float = 0.0

    @staticmethod
    def of(stats: StepStats) -> _Context:
        """Of the decoding sequences of a step."""
        saved = stats.num_past - stats.num_attended
        shared = saved / max(1, stats.num_decoding - 1)
        return _Context(max(0.0, stats.num_past / stats.num_decoding - shared), shared)

    def alike(self, stats: StepStats) -> _Context:
        """What all would stand on, were they as those of a step that only some took part in."""
        each = stats.num_past / stats.num_decoding
        shared = min(self.shared, each)
        return _Context(each - shared, shared)

    def seconds(self, batch: float, more: float, rates: tuple[float, float]) -> float:
        """What attending to them adds to a forward, `more` tokens of each above one."""
        one, each = rates
        own = batch * self.own * (one + each * more)
        return own + self.shared * (one + each * (batch * (1 + more) - 1))


@dataclass(frozen=True, slots=True)
class StandardCosts:
    """Seconds of standard decoding, by kind of token.

    Attributes:
        decoded: of one that models decide.
        forced: of one that a grammar leaves no choice about: it is read with others.
    """

    decoded: float
    forced: float

    def of(self, delivery: Delivery) -> float:
        """Of the tokens of a delivery."""
        return delivery.num_decoded * self.decoded + delivery.num_forced * self.forced


class CostTable:
    """Seconds of forwards and of steps; read and corrected on the engine thread."""

    def __init__(self, timings: Timings) -> None:
        self.timings = timings
        num_models = len(timings.forward_seconds)
        self._context = _Context(float(timings.context))
        self._factors = Factors(_NOISE**2, _SURPRISE)
        self._factors.add(_MACHINE_NAME, _MACHINE**2, _MACHINE**2, _MEMORY)
        for model in range(num_models):
            self._factors.add((model,), _MODEL**2, _MODEL**2, _MEMORY)
        self._charge = Ratio(_CHARGE_MEMORY, _CHARGE_PRIOR)
        self._rest_factors = {
            kind: Ratio(_REST_MEMORY, _REST_PRIOR) for kind in ("draw", "verify", "propose")
        }
        self._extras = [self._measure_extras(model) for model in range(num_models)]
        self._known: dict[tuple[int, float, float], float] = {}
        self._known_parts: dict[tuple[str, float], float] = {}
        self._standard: dict[tuple[tuple[int, ...], int], StandardCosts] = {}

    @property
    def slowness(self) -> float:
        """How much slower the machine is now than when its models were timed."""
        return self._factors.value([_MACHINE_NAME])

    def load(self, model: int) -> float:
        """How much slower the model's forwards are now than when they were timed."""
        return self._factors.value([_MACHINE_NAME, (model,)])

    def forward_seconds(
        self, model: int, batch: float, tokens: float, context: _Context | None = None
    ) -> float:
        """One forward of `tokens` tokens of each of `batch` sequences, all of them scored.

        The sequences are as long as those of the last step, or as `context` says.
        """
        timed = self._timed(model, batch, tokens, context or self._context)
        return timed * self._factors.value(_names(model, batch, tokens))

    def doubt(self, model: int, batch: float, tokens: float) -> float:
        """Relative deviation of `forward_seconds`, the machine's and the model's speed aside.

        Of several tokens, beside forwards of one.
        """
        return self._factors.doubt(self._known_names(model, batch, tokens)[-1])

    def rest_seconds(
        self,
        batch: float,
        num_drawn: float = 0,
        num_verified: float = 0,
        num_proposed: float = 0,
    ) -> float:
        """The rest of a step of `batch` sequences: positions drawn, verified and proposed."""
        return self.slowness * sum(
            self._rest_part(kind, rows)
            for kind, rows in (
                ("feed", batch),
                ("draw", num_drawn),
                ("verify", num_verified),
                ("propose", num_proposed),
            )
            if rows > 0
        )

    def standard(self, scorers: tuple[int, ...], batch: int) -> StandardCosts:
        """Tokens of one sequence by standard decoding, when `batch` of them decode at once."""
        key = (scorers, batch)
        if key not in self._standard:
            self._standard[key] = self._price_standard(scorers, max(1, batch))
        return self._standard[key]

    def _price_standard(self, scorers: tuple[int, ...], batch: int) -> StandardCosts:
        forwards = sum(self.forward_seconds(model, batch, 1) for model in scorers)
        longer = sum(self.forward_seconds(model, batch, 2) for model in scorers)
        rest = self.rest_seconds(batch) * (len(scorers) - 1)
        rest += self.rest_seconds(batch, num_drawn=batch)
        each = self._charge.value() / batch
        return StandardCosts(each * (forwards + rest), each * max(0.0, longer - forwards))

    def baseline(self, delivery: Delivery, batch: int) -> float:
        """Standard decoding of what was delivered, `batch` sequences decoding at once."""
        return self.standard(delivery.decoding.combination.scorers, batch).of(delivery)

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
        alone = self.forward_seconds(stats.model, batch, tokens, _Context.of(stats))
        rest = (stats.step_seconds - stats.forward_seconds) * (1 - batch / stats.num_sequences)
        return min(stats.step_seconds, max(0.0, stats.forward_seconds - alone) + max(0.0, rest))

    def price(self, stats: StepStats) -> float:
        """Expected seconds of a step, without its prompts."""
        if not stats.num_decoding:
            return 0.0
        batch = stats.num_decoding
        tokens = (stats.num_tokens - stats.num_prefill_tokens) / batch
        forward = self.forward_seconds(stats.model, batch, tokens, _Context.of(stats))
        return forward + self.rest_seconds(
            batch, stats.num_drawn, sum(stats.tails), stats.num_proposed
        )

    def observe(self, stats: StepStats) -> None:
        """Learn from one step; those that read prompts say nothing about decoding."""
        self._standard.clear()
        self._factors.pass_time(stats.step_seconds)
        if stats.num_decoding:
            # Few of many share less than all would, and one alone nothing.
            is_whole = 2 * stats.num_decoding > stats.num_running
            is_whole &= stats.num_decoding > 1 or not self._context.shared
            self._context = _Context.of(stats) if is_whole else self._context.alike(stats)
        if stats.num_prefill_tokens or not stats.num_sequences:
            return
        if not stats.overlaps:  # standard decoding is charged for steps one after the other
            self._charge.add(stats.step_seconds, self.price(stats))
        model, batch = stats.model, stats.num_sequences
        tokens = stats.num_tokens / batch
        context = _Context.of(stats) if stats.num_decoding else self._context
        timed = self._timed(model, batch, tokens, context)
        if timed > 0 and stats.forward_seconds > 0:
            names = self._known_names(model, batch, tokens)
            self._factors.observe(names, stats.forward_seconds / timed)
        if not stats.overlaps:
            self._observe_rest(stats)

    def _observe_rest(self, stats: StepStats) -> None:
        parts = {
            "draw": self._rest_part("draw", stats.num_drawn),
            "verify": self._rest_part("verify", sum(stats.tails)),
            "propose": self._rest_part("propose", stats.num_proposed),
        }
        expected = self._rest_part("feed", stats.num_sequences) + sum(parts.values())
        if expected <= 0:
            return
        rest = (stats.step_seconds - stats.forward_seconds) / self.slowness
        # What each kind of work took is not known apart; its share is blamed.
        for kind, part in parts.items():
            factor = self._rest_factors[kind]
            factor.add(rest * part / expected, part / _bounded(factor))

    def _rest_part(self, kind: str, rows: float) -> float:
        """Seconds at the load of the first timing."""
        if rows <= 0:
            return 0.0
        key = (kind, rows)
        if key not in self._known_parts:
            make_room(self._known_parts)
            self._known_parts[key] = self._first_part(kind, rows)
        first = self._known_parts[key]
        return first if kind == "feed" else first * _bounded(self._rest_factors[kind])

    def _first_part(self, kind: str, rows: float) -> float:
        """`_rest_part` before anything was learnt."""
        feed = _interpolate(self.timings.batches, self.timings.feed_seconds, rows)
        if kind == "feed":
            return feed
        draw = _interpolate(self.timings.batches, self.timings.draw_seconds, rows)
        factor = {"draw": 1.0, "verify": _VERIFY_FACTOR, "propose": _PROPOSE_FACTOR}[kind]
        return max(0.0, draw - feed) * factor

    def _timed(self, model: int, batch: float, tokens: float, context: _Context) -> float:
        """As measured at start, between and beyond what was measured."""
        key = (model, batch, tokens)
        if key not in self._known:
            make_room(self._known)
            self._known[key] = self._timed_one(model, batch) + self._extra(model, batch, tokens - 1)
        at_first = self._known[key]
        return max(_LEAST * at_first, at_first + self._past(model, batch, tokens - 1, context))

    def _past(self, model: int, batch: float, more: float, context: _Context) -> float:
        """What sequences longer than those timed, or shorter, add to a forward."""
        if not self.timings.past_seconds:
            return 0.0
        rates = self.timings.past_seconds[model]
        timed = _Context(self.timings.context)
        more = max(0.0, more)
        return context.seconds(batch, more, rates) - timed.seconds(batch, more, rates)

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

    def _known_names(self, model: int, batch: float, tokens: float) -> tuple[Name, ...]:
        """Factors of a forward's seconds, all of them in the filter."""
        names = _names(model, batch, tokens)
        self._factors.add(names[2], _ROUND**2, _TIMED**2, _MEMORY)
        if len(names) > 3:
            self._factors.add(names[3], _SHAPE**2, _SHAPE**2, _SHAPE_MEMORY)
        return names


@lru_cache(maxsize=MAX_KEPT)
def _names(model: int, batch: float, tokens: float) -> tuple[Name, ...]:
    """The machine's, the model's, and one or two of the shape, the last its very own.

    Shapes are about the same by powers of two of sequences and of tokens. Where some feed one token
    and some two, attention takes them apart: that says nothing of steps that feed one each.
    """
    size = round(math.log2(max(1.0, batch)))
    names: list[Name] = [_MACHINE_NAME, (model,), (model, size)]
    if tokens > _ABOUT_ONE:
        names.append((model, size, max(1, round(math.log2(tokens)))))
    return tuple(names)


def _extrapolate(curve: dict[int, float], batch: float) -> float:
    """Between the points; beyond the last in proportion, as rows cost a machine that is full."""
    last = max(curve)
    if batch > last:
        return curve[last] * batch / last
    return _interpolate(tuple(curve), tuple(accumulate(curve.values(), max)), batch)


def _bounded(factor: Ratio) -> float:
    """Of the rest of a step: beyond that something else than its rows was slow."""
    return min(4.0, max(0.25, factor.value()))


def _interpolate(xs: Row[float], ys: Row[float], x: float) -> float:
    """Linear between the points and beyond the last; below the first, the first."""
    if len(xs) == 1 or x <= xs[0]:
        return ys[0]
    right = min(bisect_left(xs, x), len(xs) - 1)
    left = right - 1
    slope = (ys[right] - ys[left]) / (xs[right] - xs[left])
    return ys[left] + slope * (x - xs[left])

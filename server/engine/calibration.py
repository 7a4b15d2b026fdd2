"""Times forwards and rounds of standard decoding at start: the first state of the cost table.

A *round* gives each of `batch` sequences one token the plain way: one forward of one token by every
scorer, then combining, drawing and text. Rounds are timed on the engine that will serve, with its
own pages, before anybody waits for it, and the same clocks then time real decoding. Forwards of
several tokens, as scoring proposals takes, are timed alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

from server.core.combination import Combination
from server.core.sampling_params import DecodingParams, SamplingParams
from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.engine.cost_table import CostTable, Timings
from server.engine.engine import Engine
from server.runner.base import Batch, ModelRunner, Span

logger = logging.getLogger(__name__)

# Tokens before the timed ones: what a chat or a completion typically stands on.
_CONTEXT = 128
_ROUNDS = 5  # the first of them warms up
# Twice as many sequences are tried only while that is likely to stay within this.
_BUDGET_SECONDS = 6.0
# Tokens of each sequence in the forwards that are timed alone, and how often.
_TOKENS = (1, 2, 5)  # no more than come in rounds, so they fit where these do
_REPEATS = 3
_LONGER = 4  # times as many tokens before them, where memory and models allow
_FORWARD_BUDGET_SECONDS = 3.0
_PAST_BUDGET_SECONDS = 2.0  # for repeating what longer texts add


def calibrate(engine: Engine, combination: Combination) -> CostTable | None:
    """Time rounds of `combination`, forwards of the models it does not need, and longer forwards.

    Returns:
        None where nothing could be timed: no memory for a single sequence, or scores that are no
        distribution.
    """
    points = _time_rounds(engine, combination)
    if not points:
        logger.warning("standard decoding could not be timed; no speedup will be estimated")
        return None
    return CostTable(_timings(points, engine, len(combination.scorers)))


@dataclass(slots=True)
class _Point:
    """Rounds of one batch size: seconds of forwards by model, and of the rest of their steps."""

    forwards: dict[int, list[float]] = field(default_factory=dict)
    feeds: list[float] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)

    def add(self, stats: StepStats) -> None:
        self.forwards.setdefault(stats.model, []).append(stats.forward_seconds)
        rest = stats.step_seconds - stats.forward_seconds
        (self.draws if stats.num_drawn else self.feeds).append(rest)

    def forward_seconds(self, model: int) -> float:
        return median(self.forwards[model])

    @property
    def feed_seconds(self) -> float:
        """Rest of a step that draws nothing; a combination of one model has none."""
        return median(self.feeds) if self.feeds else 0.0

    @property
    def draw_seconds(self) -> float:
        return median(self.draws)

    def __str__(self) -> str:
        each = (f"model {k} {self.forward_seconds(k) * 1e3:.1f} ms" for k in sorted(self.forwards))
        return ", ".join(each)


def _time_rounds(engine: Engine, combination: Combination) -> dict[int, _Point]:
    """By number of sequences, as many as time allows."""
    started = engine.clock()
    points: dict[int, _Point] = {}
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
    return points


def _timings(points: dict[int, _Point], engine: Engine, num_scorers: int) -> Timings:
    return Timings(
        batches=tuple(points),
        forward_seconds=tuple(
            _rising(point.forward_seconds(model) for point in points.values())
            for model in range(engine.num_models)
        ),
        feed_seconds=_rising(point.feed_seconds for point in points.values()),
        draw_seconds=_rising(point.draw_seconds for point in points.values()),
        num_scorers=num_scorers,
        span_seconds=_time_forwards(engine, tuple(points)),
        context=_num_context(engine),
        past_seconds=_time_past(engine, tuple(points)),
    )


def _time_forwards(
    engine: Engine, batches: tuple[int, ...]
) -> tuple[dict[tuple[int, int], float], ...]:
    """[num_models] of {(batch, tokens): seconds}, small batches first while time lasts."""
    seconds: tuple[dict[tuple[int, int], float], ...] = tuple({} for _ in engine.runners)
    started = engine.clock()
    # Every second power of two: the table is interpolated.
    for batch in batches[::2]:
        before = engine.clock()
        for found, times in zip(seconds, _time_spans(engine, batch), strict=True):
            found.update({(batch, tokens): median(row) for tokens, row in times.items()})
        now = engine.clock()
        if now - started + 4 * (now - before) > _FORWARD_BUDGET_SECONDS:
            break
    logger.info("timed forwards of %s tokens, up to %d at once", _TOKENS, batch)
    return seconds


def _time_past(engine: Engine, batches: tuple[int, ...]) -> tuple[tuple[float, float], ...]:
    """What a token before the ones fed adds to a forward; see `Timings.past_seconds`."""
    short = _num_context(engine)
    long = min(_LONGER * short, engine.max_length - max(_TOKENS))
    room = min((runner.num_pages - 1) * runner.page_size for runner in engine.runners)
    long = min(long, room - max(_TOKENS) - 1)
    if long < 2 * short:
        return ()
    fewest, most = min(_TOKENS), max(_TOKENS)
    batch = max(size for size in batches if size <= 4)
    found = []
    started = engine.clock()
    for runner in engine.runners:
        rows: dict[tuple[int, int], list[float]] = {}
        for repeat in range(_REPEATS):
            if repeat and engine.clock() - started > _PAST_BUDGET_SECONDS:
                break
            for past in (short, long):
                for tokens in (fewest, most):
                    seconds = _time_forward(engine, runner, batch, tokens, past)
                    rows.setdefault((past, tokens), []).append(seconds)
        one, all_of_them = (
            max(0.0, median(rows[long, tokens]) - median(rows[short, tokens]))
            / (batch * (long - short))
            for tokens in (fewest, most)
        )
        found.append((one, max(0.0, all_of_them - one) / (most - fewest)))
    return tuple(found)


def _time_spans(engine: Engine, batch: int) -> list[dict[int, list[float]]]:
    """[num_models] of {tokens: seconds of forwards}.

    All kinds take turns: work of others on the machine that comes or goes meanwhile then slows them
    alike, and what one takes beside another stays true.
    """
    times: list[dict[int, list[float]]] = [{n: [] for n in _TOKENS} for _ in engine.runners]
    for _ in range(_REPEATS):
        for runner, found in zip(engine.runners, times, strict=True):
            for tokens, row in found.items():
                seconds = _time_forward(engine, runner, batch, tokens, _num_context(engine))
                row.append(seconds)
    return times


def _time_forward(
    engine: Engine, runner: ModelRunner, batch: int, tokens: int, num_past: int
) -> float:
    """Seconds of a forward; nobody holds pages yet, so any may be written."""
    per_span = -(-(num_past + tokens) // runner.page_size)
    spans = []
    for index in range(batch):
        # Page 0 is never used. Sequences may share pages here where memory is short: no one reads.
        first = 1 + index * per_span % max(1, runner.num_pages - 1 - per_span)
        pages = range(first, first + per_span)
        spans.append(
            Span(pages, num_past, [(index + i) % engine.vocab_size for i in range(tokens)], tokens)
        )
    before = engine.clock()
    runner.forward(Batch(tuple(spans)))[-1, -1].item()
    return engine.clock() - before


def _rising(seconds: Iterable[float]) -> tuple[float, ...]:
    """More sequences never cost less; noise that says so would be extrapolated below zero."""
    return tuple(accumulate(seconds, max))


def _batches(engine: Engine) -> Iterator[int]:
    """1, 2, 4, ... as far as the engine takes them and its pages hold them."""
    if engine.max_length < _num_context(engine) + _ROUNDS + 1:
        return
    num_tokens = _num_context(engine) + _ROUNDS + 2
    limit = engine.scheduler.pages.num_fitting(num_tokens)
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
        point.forwards[model] = alone.forwards[model]
    return point


def _run(engine: Engine, combination: Combination, batch: int) -> _Point | None:
    """Decode `batch` texts together; None where that fails."""
    has_failed = False
    with engine.rehearsing() as steps:
        for index in range(batch):
            engine.add(_sequence(engine, combination, index))
        while engine.has_work:
            has_failed |= any(delta.finish_reason == "error" for delta in engine.step())
    point = _Point()
    rounds = [stats for stats in steps if stats.num_decoding == stats.num_sequences == batch]
    for stats in rounds[len(combination.scorers) :]:
        point.add(stats)
    return None if has_failed or set(point.forwards) != set(combination.scorers) else point


def _sequence(engine: Engine, combination: Combination, index: int) -> Sequence:
    """One whose context counts as read: what its pages hold costs a forward the same."""
    num_context = _num_context(engine)
    prompt = [(index + place) % engine.vocab_size for place in range(num_context)]
    # The first token comes with the prompt, the others in rounds.
    # Nobody may find pages that were never written.
    params = SamplingParams(max_tokens=_ROUNDS + 1, ignore_eos=True, seed=index, prefix_cache=False)
    decoding = DecodingParams("standard", combination, (1,) * engine.num_models)
    sequence = Sequence.start(f"calibration-{index}", prompt, params, decoding)
    sequence.num_seen = [num_context - 1] * engine.num_models
    return sequence

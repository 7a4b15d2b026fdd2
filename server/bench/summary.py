"""From blocks to the figures of one point (prompt set, concurrency, strategy).

Ratios are ratios of sums, never means of ratios, and are not clipped: below 1 is slower than
standard. Seeds fix a request's text only within one strategy, so times are divided by tokens
before they are compared; with `ignore_eos` both sides have the same number of them anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from server.bench.closed_loop import BlockResult
from server.bench.row import Row
from server.bench.strategy_spec import BASELINE

_PROPOSING = ("cos", "speculative")


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one point; times in seconds, None where there is nothing to take them from.

    Attributes:
        num_errors: requests that failed; with any, the ratios are None.
        ttft_p50, ttft_p99: time to the first chunk with a token.
        token_p50, token_p99: time per token, each chunk's time spread over its tokens.
        acceptance: [num_models] accepted / proposed tokens by proposer; None for one that
            proposed nothing.
        tokens_per_forward: [num_models] generated tokens / forwards of that model; `standard`
            has exactly 1 for every scorer, but for the first token.
        ratio: wall seconds per token of standard / those of this strategy, over all rounds.
        ratio_low, ratio_high: the same of the worst and the best single round.
        decode_ratio: the same of the time after each request's first chunk, which other requests'
            prompts share.
        engine_ratio: the same of the engine's seconds of decoding, from its metrics.
        estimated_ratio: what the server estimated meanwhile, from its metrics.
        used: share of tokens by the strategy that the server used; of interest under auto.
        gamma: [num_models] mean proposal length over tokens, 0 where a model did not propose.
        acceptance_by_position: of each proposer, by name, accepted / verified proposals at each
            place of the window; None where none was verified. From the server's metrics.
    """

    prompt_set: str
    concurrency: int
    strategy: str
    num_requests: int
    num_errors: int
    num_tokens: int
    seconds: float
    tokens_per_second: float
    ttft_p50: float | None
    ttft_p99: float | None
    token_p50: float | None
    token_p99: float | None
    acceptance: list[float | None]
    tokens_per_forward: list[float | None]
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    decode_ratio: float | None = None
    engine_ratio: float | None = None
    estimated_ratio: float | None = None
    used: dict[str, float] = field(default_factory=dict)
    gamma: list[float | None] = field(default_factory=list)
    acceptance_by_position: dict[str, list[float | None]] = field(default_factory=dict)


Point = tuple[str, int, str]


def summarise(results: Iterable[BlockResult]) -> list[Summary]:
    """One summary a point, in the order in which points first appear."""
    points: dict[Point, list[BlockResult]] = {}
    for result in results:
        key = (result.prompt_set, result.concurrency, result.strategy)
        points.setdefault(key, []).append(result)
    return [
        _summary(blocks, points.get((prompt_set, concurrency, BASELINE)))
        for (prompt_set, concurrency, _), blocks in points.items()
    ]


def _summary(blocks: list[BlockResult], baseline: list[BlockResult] | None) -> Summary:
    rows = [row for block in blocks for row in block.rows]
    answered = [row for row in rows if row.error is None]
    seconds = sum(block.seconds for block in blocks)
    num_tokens = sum(block.num_tokens for block in blocks)
    ttft = [(row.ttft, 1) for row in answered if row.ttft is not None]
    per_token = [(time / count, count) for row in answered for time, count in row.gaps]
    ratio, low, high, decode, engine = _ratios(blocks, baseline)
    return Summary(
        prompt_set=blocks[0].prompt_set,
        concurrency=blocks[0].concurrency,
        strategy=blocks[0].strategy,
        num_requests=len(rows),
        num_errors=len(rows) - len(answered),
        num_tokens=num_tokens,
        seconds=seconds,
        tokens_per_second=num_tokens / seconds,
        ttft_p50=quantile(ttft, 0.50),
        ttft_p99=quantile(ttft, 0.99),
        token_p50=quantile(per_token, 0.50),
        token_p99=quantile(per_token, 0.99),
        acceptance=_divide(_by_model(answered, "accepted"), _by_model(answered, "proposed")),
        tokens_per_forward=_tokens_per_forward(answered),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        decode_ratio=decode,
        engine_ratio=engine,
        estimated_ratio=_estimated(blocks),
        used=_used(answered),
        gamma=_gamma(answered),
        acceptance_by_position=_acceptance_by_position(blocks),
    )


def _used(rows: Iterable[Row]) -> dict[str, float]:
    """Share of tokens by the strategy that the server used, most first."""
    tokens: Counter[str] = Counter()
    for row in rows:
        tokens.update(row.cos.get("strategies", {}))
    return {name: count / tokens.total() for name, count in tokens.most_common()}


def _estimated(blocks: Iterable[BlockResult]) -> float | None:
    known = [block.reading for block in blocks if block.reading is not None]
    seconds = sum(each.decode_seconds for each in known)
    return sum(each.baseline_seconds for each in known) / seconds if seconds > 0 else None


def _gamma(rows: Iterable[Row]) -> list[float | None]:
    """A request tells the lengths it last had and how many of its tokens were proposed for."""
    known = [row for row in rows if "gamma" in row.cos and "strategies" in row.cos]
    num_tokens = sum(sum(row.cos["strategies"].values()) for row in known)
    sums = [
        [length * _num_speculated(row.cos["strategies"]) for length in row.cos["gamma"]]
        for row in known
    ]
    return [sum(column) / num_tokens if num_tokens else None for column in zip(*sums, strict=True)]


def _num_speculated(tokens: dict[str, int]) -> int:
    return sum(count for name, count in tokens.items() if name in _PROPOSING)


def _acceptance_by_position(blocks: Iterable[BlockResult]) -> dict[str, list[float | None]]:
    """Positions after the last one that was ever verified are left out."""
    readings = [block.reading for block in blocks if block.reading is not None]
    result = {}
    for name in dict.fromkeys(name for reading in readings for name in reading.verified):
        verified = _sum(reading.verified[name] for reading in readings)
        accepted = _sum(reading.accepted[name] for reading in readings)
        width = max((i + 1 for i, count in enumerate(verified) if count), default=0)
        result[name] = _divide(accepted[:width], verified[:width])
    return result


def _sum(rows: Iterable[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def quantile(values: Sequence[tuple[float, int]], q: float) -> float | None:
    """Nearest-rank quantile of (value, count) pairs; None of nothing."""
    rank = q * sum(count for _, count in values)
    below = 0
    for value, count in sorted(values):
        below += count
        if below >= rank:
            return value
    return None


def _by_model(rows: Iterable[Row], key: str) -> list[int]:
    """[num_models] sums of one list of the server's reports."""
    reports = [row.cos[key] for row in rows if key in row.cos]
    return [sum(column) for column in zip(*reports, strict=True)]


def _divide(numerators: Iterable[int], denominators: Iterable[int]) -> list[float | None]:
    return [a / b if b else None for a, b in zip(numerators, denominators, strict=True)]


def _tokens_per_forward(rows: list[Row]) -> list[float | None]:
    forwards = _by_model(rows, "forwards")
    num_tokens = sum(row.num_tokens for row in rows if "forwards" in row.cos)
    return _divide([num_tokens] * len(forwards), forwards)


Ratios = tuple[float | None, float | None, float | None, float | None, float | None]


def _ratios(blocks: list[BlockResult], baseline: list[BlockResult] | None) -> Ratios:
    """(all rounds, worst round, best round, decode time, engine's); None for no fair figure."""
    if baseline is None or any(block.num_errors for block in (*blocks, *baseline)):
        return None, None, None, None, None
    pairs = zip(_rounds(baseline), _rounds(blocks), strict=True)
    rounds = [_ratio(theirs, ours, _wall) for theirs, ours in pairs]
    known = [ratio for ratio in rounds if ratio is not None]
    return (
        _ratio(baseline, blocks, _wall),
        min(known, default=None),
        max(known, default=None),
        _ratio(baseline, blocks, _decode),
        _ratio(baseline, blocks, _engine),
    )


def _rounds(blocks: list[BlockResult]) -> list[list[BlockResult]]:
    ordered = sorted(blocks, key=lambda block: block.round)
    return [list(group) for _, group in groupby(ordered, key=lambda block: block.round)]


def _wall(blocks: list[BlockResult]) -> tuple[float, int]:
    return sum(block.seconds for block in blocks), sum(block.num_tokens for block in blocks)


def _decode(blocks: list[BlockResult]) -> tuple[float, int]:
    rows = [row for block in blocks for row in block.rows]
    return sum(row.decode_seconds for row in rows), sum(row.num_decoded for row in rows)


def _engine(blocks: list[BlockResult]) -> tuple[float, int]:
    """Nothing where a block has no reading."""
    seconds = [block.reading.decode_seconds for block in blocks if block.reading is not None]
    return (sum(seconds), _decode(blocks)[1]) if len(seconds) == len(blocks) else (0.0, 0)


def _ratio(
    baseline: list[BlockResult],
    blocks: list[BlockResult],
    measure: Callable[[list[BlockResult]], tuple[float, int]],
) -> float | None:
    """Seconds per token of `baseline` over those of `blocks`."""
    (base_seconds, base_tokens), (seconds, tokens) = measure(baseline), measure(blocks)
    if not (base_tokens and tokens and seconds):
        return None
    return (base_seconds / base_tokens) / (seconds / tokens)

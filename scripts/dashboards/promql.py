"""PromQL over recorded scrapes, worked out apart from Prometheus: an oracle for its answers.

Only the forms that the dashboards and rules use; anything else is refused. A vector is
{labels: value}, labels without the metric's name.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import promql_parser as promql

from server.scrape import Labels, Scrape

Vector = dict[Labels, float]
Point = tuple[float, float]  # unix time, value

_STALE_SECONDS = 300.0  # older samples are no longer current
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda a, b: a / b if b else math.nan,
}
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_AGGREGATIONS: dict[str, Callable[[Iterable[float]], float]] = {
    "sum": sum,
    "min": min,
    "max": max,
    "count": lambda values: float(len(list(values))),
}


class Unsupported(Exception):
    """A form of PromQL that this module does not know."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What one target answered, and when it was asked."""

    scrapes: tuple[tuple[float, Scrape], ...]
    target: Labels  # labels that Prometheus adds


class Evaluator:
    """One moment's view of a recording."""

    def __init__(self, recording: Recording, moment: float) -> None:
        """`moment` is unix time."""
        self._scrapes = [(when, scrape) for when, scrape in recording.scrapes if when <= moment]
        self._target = recording.target
        self._moment = moment

    def evaluate(self, query: str) -> Vector:
        """An instant query; a scalar is the vector that has no labels."""
        result = self._of(promql.parse(query))
        return result if isinstance(result, dict) else {frozenset(): result}

    def _of(self, expression: promql.Expr) -> Vector | float:
        match expression:
            case promql.NumberLiteral():
                return expression.val
            case promql.ParenExpr():
                return self._of(expression.expr)
            case promql.UnaryExpr():
                inner = self._of(expression.expr)
                if isinstance(inner, dict):
                    return {labels: -value for labels, value in inner.items()}
                return -inner
            case promql.VectorSelector():
                return self._instant(expression)
            case promql.AggregateExpr():
                return self._aggregate(expression)
            case promql.BinaryExpr():
                return self._binary(expression)
            case promql.Call():
                return self._call(expression)
        raise Unsupported(type(expression).__name__)

    def _vector(self, expression: promql.Expr) -> Vector:
        result = self._of(expression)
        if not isinstance(result, dict):
            raise Unsupported("a number where a vector is wanted")
        return result

    def _instant(self, selector: promql.VectorSelector) -> Vector:
        if not self._scrapes or self._moment - self._scrapes[-1][0] > _STALE_SECONDS:
            return {}
        # A series that the newest scrape lacks has ended there.
        newest = self._scrapes[-1][1]
        return dict(self._select(newest, selector))

    def _range(self, selector: promql.MatrixSelector) -> dict[Labels, list[Point]]:
        begin = self._moment - selector.range.total_seconds()
        found: dict[Labels, list[Point]] = {}
        for when, scrape in self._scrapes:
            if when >= begin:
                for labels, value in self._select(scrape, selector.vector_selector):
                    found.setdefault(labels, []).append((when, value))
        return found

    def _select(
        self, scrape: Scrape, selector: promql.VectorSelector
    ) -> Iterable[tuple[Labels, float]]:
        for labels, value in scrape.samples.get(selector.name or "", {}).items():
            full = labels | self._target
            known = dict(full)
            if all(_matches(matcher, known) for matcher in selector.matchers.matchers):
                yield full, value

    def _aggregate(self, expression: promql.AggregateExpr) -> Vector:
        modifier = expression.modifier
        if modifier is not None and modifier.type != promql.AggModifierType.By:
            raise Unsupported("without")
        kept = set(modifier.labels) if modifier is not None else set()
        groups: dict[Labels, list[float]] = {}
        for labels, value in self._vector(expression.expr).items():
            groups.setdefault(_only(labels, kept), []).append(value)
        combine = _AGGREGATIONS[str(expression.op)]
        return {labels: combine(values) for labels, values in groups.items()}

    def _binary(self, expression: promql.BinaryExpr) -> Vector | float:
        op = str(expression.op)
        left, right = self._of(expression.lhs), self._of(expression.rhs)
        if op == "and":
            assert isinstance(left, dict)
            assert isinstance(right, dict)
            return {labels: value for labels, value in left.items() if labels in right}
        if isinstance(left, dict) and isinstance(right, dict):
            return _match(expression, op, left, right)
        if isinstance(left, dict):
            assert isinstance(right, float)
            return _with_number(op, left, right)
        if isinstance(right, dict):
            if op in _COMPARISONS:
                raise Unsupported("a comparison with the number first")
            return {labels: _ARITHMETIC[op](left, value) for labels, value in right.items()}
        return _ARITHMETIC[op](left, right)

    def _call(self, call: promql.Call) -> Vector | float:
        match call.func.name, call.args:
            case "time", []:
                return self._moment
            case "rate", [promql.MatrixSelector() as selector]:
                return self._rate(selector)
            case "min_over_time", [promql.MatrixSelector() as selector]:
                rows = self._range(selector)
                return {labels: min(v for _, v in row) for labels, row in rows.items()}
            case "changes", [promql.MatrixSelector() as selector]:
                return {labels: _changes(row) for labels, row in self._range(selector).items()}
            case "clamp_min", [inner, promql.NumberLiteral() as least]:
                return {k: max(value, least.val) for k, value in self._vector(inner).items()}
            case "histogram_quantile", [promql.NumberLiteral() as q, inner]:
                return _quantiles(q.val, self._vector(inner))
        raise Unsupported(call.func.name)

    def _rate(self, selector: promql.MatrixSelector) -> Vector:
        seconds = selector.range.total_seconds()
        begin = self._moment - seconds
        rates = {}
        for labels, points in self._range(selector).items():
            if len(points) > 1:
                rates[labels] = _increase(points, begin, self._moment) / seconds
        return rates


def _changes(points: Sequence[Point]) -> float:
    values = [value for _, value in points]
    return float(sum(a != b for a, b in pairwise(values)))


def _matches(matcher: promql.Matcher, labels: dict[str, str]) -> bool:
    value = labels.get(matcher.name, "")
    if matcher.op in (promql.MatchOp.Equal, promql.MatchOp.NotEqual):
        is_wanted = bool(matcher.op == promql.MatchOp.Equal)
        return (value == matcher.value) == is_wanted
    is_match = re.fullmatch(matcher.value, value) is not None
    is_wanted = bool(matcher.op == promql.MatchOp.Re)
    return is_match == is_wanted


def _only(labels: Labels, kept: set[str]) -> Labels:
    return frozenset((name, value) for name, value in labels if name in kept)


def _with_number(op: str, vector: Vector, number: float) -> Vector:
    if op in _COMPARISONS:
        compare = _COMPARISONS[op]
        return {labels: value for labels, value in vector.items() if compare(value, number)}
    return {labels: _ARITHMETIC[op](value, number) for labels, value in vector.items()}


def _match(expression: promql.BinaryExpr, op: str, left: Vector, right: Vector) -> Vector:
    """Arithmetic of two vectors: the same labels on both sides, or `on` with many to the right."""
    modifier = expression.modifier
    if modifier is None or modifier.matching is None:
        return {k: _ARITHMETIC[op](left[k], right[k]) for k in left if k in right}
    if modifier.card != promql.VectorMatchCardinality.OneToMany:
        raise Unsupported("matching other than group_right")
    kept = set(modifier.matching.labels)
    ones = {_only(labels, kept): value for labels, value in left.items()}
    result = {}
    for labels, value in right.items():
        if (key := _only(labels, kept)) in ones:
            result[labels] = _ARITHMETIC[op](ones[key], value)
    return result


def _increase(points: Sequence[Point], begin: float, end: float) -> float:
    """Growth of a counter in (begin, end], stretched to its edges as Prometheus does it.

    A series is taken to reach an edge that is about one scrape away, or else half a scrape beyond
    its last sample; and never to have been below 0.
    """
    (first_time, first), (last_time, last) = points[0], points[-1]
    resets = sum(a for (_, a), (_, b) in zip(points, points[1:], strict=False) if b < a)
    growth = last - first + resets
    covered = last_time - first_time
    each = covered / (len(points) - 1)
    before, after = first_time - begin, end - last_time
    if growth > 0 and first >= 0:
        before = min(before, covered * first / growth)
    stretched = covered + sum(gap if gap < each * 1.1 else each / 2 for gap in (before, after))
    return growth * stretched / covered


def _quantiles(q: float, buckets: Vector) -> Vector:
    """Linear within the bucket that holds the quantile."""
    groups: dict[Labels, list[tuple[float, float]]] = {}
    for labels, count in buckets.items():
        known = dict(labels)
        bound = float(known.pop("le"))
        groups.setdefault(frozenset(known.items()), []).append((bound, count))
    return {labels: _quantile(q, sorted(rows)) for labels, rows in groups.items()}


def _quantile(q: float, rows: list[tuple[float, float]]) -> float:
    """`rows` are (upper bound, cumulative count), the last one unbounded."""
    total = rows[-1][1]
    if total == 0 or len(rows) < 2 or not math.isinf(rows[-1][0]):
        return math.nan
    rank = q * total
    index = next(i for i, (_, count) in enumerate(rows) if count >= rank)
    if index == len(rows) - 1:
        return rows[-2][0]
    begin, below = rows[index - 1] if index else (0.0, 0.0)
    bound, count = rows[index]
    return begin + (bound - begin) * (rank - below) / (count - below)

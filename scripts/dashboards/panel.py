"""Panels as data, and the PromQL they are made of."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Panel:
    """One graph: (legend, PromQL) pairs; `is_rare` where having no data is nothing unusual."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    description: str = ""
    is_stacked: bool = False
    thresholds: tuple[tuple[float | None, str], ...] = ()
    maximum: float | None = None
    is_rare: bool = False


@dataclass(frozen=True)
class Dashboard:
    """Rows of panels, in reading order."""

    uid: str
    title: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...] = field(default=())


def series(metric: str, labels: str = "") -> str:
    return f'{metric}{{job=~"$job"{"," + labels if labels else ""}}}'


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """Sum of rates."""
    group = f" by ({by}) " if by else ""
    return f"sum{group}(rate({series(metric, labels)}[$__rate_interval]))"


def ratio(over: str, under: str, join: str = "") -> str:
    """Nothing where the denominator is 0."""
    return f"{over} / {join}({under} > 0)"


def quantiles(metric: str) -> tuple[tuple[str, str], ...]:
    """Of one histogram: p50, p95, p99."""
    return tuple(
        (f"p{q * 100:.0f}", f"histogram_quantile({q}, {rate(metric + '_bucket', 'le')})")
        for q in (0.5, 0.95, 0.99)
    )


def mean(metric: str) -> str:
    """Of one histogram."""
    return by_mean(metric, "")


def by_mean(metric: str, by: str) -> str:
    """Of each of the histograms by a label."""
    return ratio(rate(f"{metric}_sum", by), rate(f"{metric}_count", by))

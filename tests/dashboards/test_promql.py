"""The oracle that Prometheus is compared with, on numbers small enough to do by hand."""

from __future__ import annotations

import math

import pytest

from scripts.dashboards.promql import Evaluator, Recording, Unsupported, Vector
from server.scrape import parse_metrics


def recording(*texts: str, every: float = 10.0) -> Recording:
    scrapes = [(every * i, parse_metrics(text, every * i)) for i, text in enumerate(texts)]
    return Recording(tuple(scrapes), frozenset({("job", "j")}))


def ask(query: str, *texts: str, moment: float | None = None) -> Vector:
    recorded = recording(*texts)
    return Evaluator(recorded, recorded.scrapes[-1][0] if moment is None else moment).evaluate(
        query
    )


def value(query: str, *texts: str, moment: float | None = None) -> float:
    [(labels, found)] = ask(query, *texts, moment=moment).items()
    assert labels == frozenset()
    return found


def buckets(*counts: int) -> str:
    names = ("1", "2", "+Inf")
    pairs = zip(names, counts, strict=True)
    return "\n".join(f'h_bucket{{le="{le}"}} {count}' for le, count in pairs)


def test_labels_of_the_target_are_added_and_matched() -> None:
    text = 'a{x="1"} 2\na{x="2"} 3'
    found = ask('a{job="j", x=~"1|9"}', text)
    assert found == {frozenset({("job", "j"), ("x", "1")}): 2}
    assert ask('a{job!="j"}', text) == {}
    assert value("sum(a)", text) == 5
    assert ask("max by (job) (a)", text) == {frozenset({("job", "j")}): 3}


def test_a_rate_is_stretched_to_the_edges() -> None:
    texts = [f"c {100 + 2 * i}" for i in range(5)]  # at 0, 10, ... 40: 0.2 a second
    # 40 s seen of 40, and of 60 with the window's begin too far away: half a scrape is added.
    assert value("sum(rate(c[40s]))", *texts) == pytest.approx(0.2)
    assert value("sum(rate(c[60s]))", *texts) == pytest.approx(0.2 * 45 / 60)
    assert value("sum(rate(c[60s]))", *texts, moment=49) == pytest.approx(0.2 * (5 + 40 + 9) / 60)


def test_changes_are_of_neighbours() -> None:
    texts = [f"g {value}" for value in (1, 1, 3, 1, 1)]
    assert value("sum(changes(g[50s]))", *texts) == 2


def test_a_counter_was_never_below_0() -> None:
    # 2 a scrape, and 1 at first: it began half a scrape before.
    texts = [f"c {1 + 2 * i}" for i in range(4)]
    assert value("sum(rate(c[38s]))", *texts) == pytest.approx((6 + 1) / 38)


def test_a_counter_that_starts_again_has_grown() -> None:
    assert value("sum(rate(c[20s]))", "c 100", "c 103", "c 2") == pytest.approx(5 / 20)


def test_one_sample_is_no_rate() -> None:
    assert ask("rate(c[5s])", "c 1", "c 2") == {}


@pytest.mark.parametrize(
    ("q", "expected"), [(0.25, 0.5), (0.5, 1.0), (0.75, 1.5), (0.9, 1.8), (1.0, 2.0)]
)
def test_quantiles_are_linear_within_a_bucket(q: float, expected: float) -> None:
    query = f"histogram_quantile({q}, sum by (le) (h_bucket))"
    assert value(query, buckets(50, 100, 100)) == pytest.approx(expected)


def test_a_quantile_beyond_the_last_bound_is_that_bound() -> None:
    assert value("histogram_quantile(0.9, sum by (le) (h_bucket))", buckets(1, 2, 10)) == 2


def test_quantiles_of_nothing_are_no_numbers() -> None:
    assert math.isnan(value("histogram_quantile(0.9, sum by (le) (h_bucket))", buckets(0, 0, 0)))


def test_division_by_nothing_is_nothing() -> None:
    assert ask("sum(a) / (sum(b) > 0)", "a 1\nb 0") == {}
    assert value("sum(a) / (sum(b) > 0)", "a 1\nb 4") == 0.25


def test_many_to_one() -> None:
    text = 'a 6\nb{m="x"} 2\nb{m="y"} 3'
    found = ask("sum(a) / on () group_right () (sum by (m) (b) > 0)", text)
    assert found == {frozenset({("m", "x")}): 3, frozenset({("m", "y")}): 2}


def test_the_rest() -> None:
    text = 'a 6\nb 2\nb{m="x"} 2'
    assert value("-sum(a)", text) == -6
    assert value("clamp_min(sum(b) - sum(a), 0)", text) == 0
    assert value("sum(a) * 2 - 1", text) == 11
    assert value("time() - 1", text, moment=5) == 4
    assert value("count(b)", text) == 2
    assert ask("a == 6 and b > 1 and time() - a > 90", text, moment=99) != {}
    assert ask("a == 6 and b > 2", text) == {}
    assert ask("min_over_time(a[20s])", "a 3", "a 1", "a 2") == {frozenset({("job", "j")}): 1}


def test_what_has_ended_is_gone() -> None:
    assert ask("a", "a 1", "b 1") == {}
    assert ask("a", "a 1", moment=301) == {}


@pytest.mark.parametrize("query", ["irate(a[1m])", "sum without (x) (a)", "a / on (x) a", "1 < a"])
def test_what_it_does_not_know_it_refuses(query: str) -> None:
    with pytest.raises(Unsupported):
        ask(query, 'a{x="1"} 1')

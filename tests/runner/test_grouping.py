"""Which spans are taken together; what attention finds then is in test_shared_prefix.py."""

import pytest

from server.runner import grouping
from server.runner.base import Span
from server.runner.grouping import packing_order, taken_together

PAGE = 4


def sizes(spans, gathers=True):
    """(spans, pages in common) of all that are taken together."""
    ordered = [spans[i] for i in packing_order(spans, PAGE, gathers)]
    found = taken_together(ordered, PAGE, gathers)
    assert [span for together in found for span in together.spans] == ordered
    return [(len(together.spans), together.num_shared) for together in found]


@pytest.mark.parametrize(
    ("max_gathered", "num_own", "expected"),
    [
        (16, 16, [(2, 10)]),
        (16, 17, [(1, 0), (1, 0)]),
        (30, 20, [(2, 10)]),
        (30, 21, [(1, 0), (1, 0)]),
    ],
)
def test_what_follows_a_common_beginning_is_gathered_up_to_a_length(
    monkeypatch, max_gathered, num_own, expected
):
    """What one call may gather, and no more than two texts spare by their 40 tokens in common."""
    monkeypatch.setattr(grouping, "MAX_GATHERED_LENGTH", max_gathered)
    monkeypatch.setattr(grouping, "MIN_SHARED_LENGTH", 40)
    first = range(1, 11)
    tables = [[*first, *range(start, start + 6)] for start in (20, 30)]
    for num_tokens in (1, 3):
        past = 10 * PAGE + num_own - num_tokens
        assert sizes([Span(table, past, [0] * num_tokens, 1) for table in tables]) == expected


@pytest.mark.parametrize(("num_past", "expected"), [(8, [(2, 2)]), (7, [(1, 0), (1, 0)])])
def test_a_beginning_is_common_from_a_length_on(monkeypatch, num_past, expected):
    monkeypatch.setattr(grouping, "MAX_GATHERED_LENGTH", 4)
    monkeypatch.setattr(grouping, "MIN_SHARED_LENGTH", 8)
    assert sizes([Span([1, 2, last], num_past, [0], 1) for last in (3, 4)]) == expected


def test_a_page_that_one_has_not_consumed_is_not_shared(monkeypatch):
    monkeypatch.setattr(grouping, "MAX_GATHERED_LENGTH", 5)
    monkeypatch.setattr(grouping, "MIN_SHARED_LENGTH", 8)
    spans = [Span([1, 2, 3, last], past, [0], 1) for last, past in ((4, 12), (5, 8), (6, 12))]
    assert sizes(spans) == [(3, 2)]


@pytest.mark.parametrize("gathers", [True, False])
def test_spans_of_many_tokens_are_alone_and_of_few_together(gathers):
    long = [Span(range(1, 9), 0, [0] * 17, 1)] * 2
    short = [Span(range(1, 9), past, [0] * count, 1) for past, count in ((9, 1), (0, 2), (3, 1))]
    assert sizes([*long, *short], gathers) == [(2, 0), (1, 0), (1, 0), (1, 0)]

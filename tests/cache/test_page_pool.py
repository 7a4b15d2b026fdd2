from __future__ import annotations

import random

import pytest

from server.cache.page_pool import PagePool
from server.cache.page_table import PageTable


def test_random_growth_and_release_loses_no_page() -> None:
    rng = random.Random(1)
    pool = PagePool(num_pages=40, page_size=4)
    tables = [PageTable(pool) for _ in range(8)]
    for _ in range(2000):
        table = rng.choice(tables)
        wanted = rng.randrange(60)
        if table.num_missing(wanted) <= pool.num_free:
            table.grow(wanted)
            assert len(table.pages) >= pool.pages_for(wanted)
        else:
            with pytest.raises(IndexError):
                table.grow(wanted)
        if rng.random() < 0.3:
            table.release()
        held = [page for each in tables for page in each.pages]
        pool.check_integrity(held)
        assert pool.num_used == len(held)
        assert 0 not in held


def test_pages_of_a_lone_sequence_lie_side_by_side() -> None:
    table = PageTable(PagePool(num_pages=10, page_size=4))
    for length in range(1, 30):
        table.grow(length)
    assert table.pages == list(range(1, 9))


def test_pages_continue_a_sequence_although_lower_ones_are_free() -> None:
    pool = PagePool(num_pages=10, page_size=4)
    lower, last = pool.take(3), pool.take(1)
    pool.give_back(lower)
    assert pool.take(2, after=last[0]) == [5, 6]
    assert pool.take(4, after=6) == [7, 8, 9, 1]


def test_a_lost_page_is_noticed() -> None:
    pool = PagePool(num_pages=4, page_size=1)
    pages = pool.take(2)
    with pytest.raises(AssertionError, match="lost or held twice"):
        pool.check_integrity(pages[:1])
    with pytest.raises(AssertionError, match="lost or held twice"):
        pool.check_integrity([*pages, pages[0]])

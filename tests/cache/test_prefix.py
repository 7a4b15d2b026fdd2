"""Pages that several sequences hold, that outlive them, and that are found by their tokens."""

from __future__ import annotations

import random

import pytest

from server.cache.page_pool import PagePool
from server.cache.page_table import PageTable
from server.cache.prefix_keys import PrefixKeys

SIZE = 4


def make_table(pool: PagePool, salt: str = "") -> PageTable:
    return PageTable(pool, PrefixKeys(SIZE, salt))


def read(pool: PagePool, tokens: list[int], salt: str = "") -> PageTable:
    """A table whose sequence has consumed all of `tokens`, all verified."""
    table = make_table(pool, salt)
    table.adopt(tokens, 0, len(tokens))
    table.grow(len(tokens))
    table.publish(tokens, len(tokens))
    return table


def test_a_prefix_is_found_while_it_is_read_and_after() -> None:
    pool = PagePool(20, SIZE)
    first = read(pool, list(range(10)))
    second = make_table(pool)
    assert second.adopt([*range(8), 99, 98], 0, 9) == 8
    assert second.pages == first.pages[:2]
    pool.check_integrity([*first.pages, *second.pages])
    first.release()
    second.release()
    assert (pool.num_used, pool.num_idle, pool.num_free) == (0, 2, 19)
    third = make_table(pool)
    assert third.adopt(list(range(10)), 0, 7) == 4  # the page that ends at 8 is beyond the limit
    assert pool.num_used == 1
    pool.check_integrity(third.pages)


@pytest.mark.parametrize("changed", range(8))
def test_every_token_before_the_end_of_a_page_counts(changed: int) -> None:
    pool = PagePool(20, SIZE)
    read(pool, list(range(8)))
    tokens = list(range(8))
    tokens[changed] = 50
    assert make_table(pool).adopt(tokens, 0, 8) == changed // SIZE * SIZE


def test_equal_pages_behind_different_ones_are_not_equal() -> None:
    pool = PagePool(20, SIZE)
    read(pool, [1] * 4 + [7] * 4)
    assert make_table(pool).adopt([7] * 8, 0, 8) == 0


def test_salts_and_tables_without_a_cache_share_nothing() -> None:
    pool = PagePool(20, SIZE)
    table = read(pool, list(range(8)), "a")
    for salt, found in (("", 0), ("b", 0), ("a", 8)):
        assert make_table(pool, salt).adopt(list(range(8)), 0, 8) == found
    plain = PageTable(pool)
    assert plain.adopt(list(range(8)), 0, 8) == 0
    plain.grow(8)
    plain.publish(list(range(8)), 8)
    idle = pool.num_idle
    plain.release()
    assert pool.num_idle == idle
    assert table.pages


def test_what_is_withdrawn_is_not_published_again_by_who_found_it() -> None:
    pool = PagePool(20, SIZE)
    tokens = list(range(12))
    first, second = read(pool, tokens[:8]), make_table(pool)
    assert second.adopt(tokens, 0, 8) == 8
    first.withdraw()
    second.grow(12)
    second.publish(tokens, 12)
    assert make_table(pool).adopt(tokens, 0, 12) == 0
    pool.check_integrity([*first.pages, *second.pages])


def test_what_is_withdrawn_is_not_published_again_by_who_read_it() -> None:
    pool = PagePool(20, SIZE)
    tokens = list(range(12))
    table = read(pool, tokens[:8])
    table.withdraw()
    table.grow(12)
    table.publish(tokens, 12)
    assert make_table(pool).adopt(tokens, 0, 12) == 0


def test_a_table_that_is_filled_again_publishes_again() -> None:
    """As that of a preempted sequence, whose pages others have taken meanwhile."""
    pool = PagePool(4, SIZE)
    tokens = list(range(8))
    table = read(pool, tokens)
    table.release()
    pool.give_back(pool.take(3))
    table.grow(8)
    table.publish(tokens, 8)
    assert make_table(pool).adopt(tokens, 0, 8) == 8


def test_a_page_that_is_half_read_is_replaced_by_a_whole_one() -> None:
    pool = PagePool(20, SIZE)
    tokens = list(range(12))
    late = make_table(pool)
    late.grow(12)
    other = read(pool, tokens)
    assert late.adopt(tokens, 6, 11) == 8
    assert late.pages[1] == other.pages[1]
    assert late.pages[0] != other.pages[0]
    assert late.pages[2] != other.pages[2]
    pool.check_integrity([*late.pages, *other.pages])


def test_the_end_of_the_oldest_prefix_goes_first() -> None:
    pool = PagePool(7, SIZE)
    old, new = list(range(12)), list(range(100, 112))
    read(pool, old).release()
    read(pool, new).release()
    assert (pool.num_idle, pool.num_free) == (6, 6)
    taken = pool.take(2)
    assert make_table(pool).adopt(old, 0, 12) == 4
    pool.give_back(taken)
    assert make_table(pool).adopt(new, 0, 12) == 12


def test_pages_that_are_held_are_never_taken() -> None:
    pool = PagePool(4, SIZE)
    table = read(pool, list(range(8)))
    assert pool.num_free == 1
    with pytest.raises(IndexError):
        pool.take(2)
    assert make_table(pool).adopt(list(range(8)), 0, 8) == 8
    table.release()
    assert pool.num_free == 1


def test_pages_lie_side_by_side_although_prefixes_are_kept() -> None:
    """Chats of one user, each longer than the last: their KV is read without a copy."""
    pool = PagePool(100, SIZE)
    tokens = list(range(200))
    for length in (10, 30, 70, 110):
        table = make_table(pool)
        num_seen = table.adopt(tokens, 0, length - 1)
        for end in range(num_seen, length + 1):
            table.grow(end)
        assert table.pages == list(range(1, pool.pages_for(length) + 1))
        table.publish(tokens, length)
        table.release()


@pytest.mark.parametrize("seed", range(6))
def test_random_use_keeps_contents_and_counts(seed: int) -> None:
    """Each page remembers what its prefix is; nobody ever finds or loses another's."""
    rng = random.Random(seed)
    pool = PagePool(30, SIZE)
    content: dict[int, tuple[int, ...]] = {}
    live: list[tuple[PageTable, list[int], int]] = []
    num_found = 0
    for _ in range(1500):
        if live and (rng.random() < 0.4 or len(live) > 6):
            table, _, _ = live.pop(rng.randrange(len(live)))
            table.release()
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 24))]
            table = make_table(pool, rng.choice(["", "x"]))
            num_seen = table.adopt(tokens, 0, len(tokens) - 1)
            num_found += num_seen
            if table.num_missing(len(tokens)) > pool.num_free:
                table.release()
            else:
                table.grow(len(tokens))
                _write(table, tokens, num_seen, content)
                verified = rng.randrange(num_seen, len(tokens) + 1)
                table.publish(tokens, verified)
                live.append((table, tokens, verified))
        pool.check_integrity([page for table, _, _ in live for page in table.pages])
        for table, tokens, _ in live:
            for index, page in enumerate(table.pages):
                assert content[page] == tuple(tokens[: (index + 1) * SIZE])
    assert num_found > 300


def _write(
    table: PageTable, tokens: list[int], num_seen: int, content: dict[int, tuple[int, ...]]
) -> None:
    for index in range(num_seen // SIZE, len(table.pages)):
        content[table.pages[index]] = tuple(tokens[: (index + 1) * SIZE])


def test_a_lost_cached_page_is_noticed() -> None:
    pool = PagePool(8, SIZE)
    table = read(pool, list(range(8)))
    pool.check_integrity(table.pages)
    with pytest.raises(AssertionError):
        pool.check_integrity(table.pages[:1])
    with pytest.raises(AssertionError):
        pool.check_integrity([*table.pages, table.pages[0]])

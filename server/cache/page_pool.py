"""Pages of one model's KV memory: bookkeeping only, no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from server.cache.prefix_index import PrefixIndex

_BLANK = b"\x01"


class PagePool:
    """Hands out page numbers 1 .. num_pages - 1.

    A page is *held* by the page tables that list it, each once; or *idle*, kept because the prefix
    in it may be wanted again; or *blank*. Blank and idle pages are free to be taken, blank ones
    first. Page 0 is never handed out: padding spans of static-shape forwards write there.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """`num_pages` counts page 0; `page_size` is in tokens."""
        self.num_pages = num_pages
        self.page_size = page_size
        self._blank = bytearray(b"\x00" + _BLANK * (num_pages - 1))  # by page
        self._num_blank = num_pages - 1
        self._holders = [0] * num_pages
        self._index = PrefixIndex()

    @property
    def num_free(self) -> int:
        """Pages that may be taken."""
        return self._num_blank + self._index.num_idle

    @property
    def num_idle(self) -> int:
        """Free pages that hold a prefix."""
        return self._index.num_idle

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - 1 - self.num_free

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def take(self, count: int, after: int = 0) -> list[int]:
        """Free pages that lie side by side where that can be had: such KV is read without a copy.

        Args:
            count: how many.
            after: the page that they continue, 0 if none.

        Raises:
            IndexError: fewer than `count` are free; the caller asks first.
        """
        if count > self.num_free:
            raise IndexError(f"{count} pages wanted, {self.num_free} free")
        for _ in range(count - self._num_blank):
            self._give_up(self._index.evict())
        taken = self._following(after, count) if after else []
        self._mark(taken)
        if missing := count - len(taken):
            rest = self._side_by_side(missing)
            self._mark(rest)
            taken += rest
        return taken

    def find(self, key: bytes) -> int | None:
        """The page that holds the prefix called `key`."""
        return self._index.find(key)

    def share(self, page: int) -> None:
        """Hold a page that was found."""
        if self._holders[page] == 0:
            self._index.revive(page)
        self._holders[page] += 1

    def publish(self, page: int, key: bytes) -> None:
        """Let a held page be found; its content stays as it is from now on."""
        self._index.add(key, page)

    def withdraw(self, pages: Iterable[int]) -> None:
        """Let held pages be found no more: what is in them is not to be trusted."""
        for page in pages:
            self._index.forget(page)

    def give_back(self, pages: Iterable[int]) -> None:
        """One holder less for each; what was published stays findable until it is taken."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0 and not self._index.retire(page):
                self._give_up(page)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless each page is blank, idle, or `held` as often as counted."""
        holders = Counter(held)
        assert all(self._holders[page] == count for page, count in holders.items()), (
            "a page is lost or held twice"
        )
        assert sum(self._holders) == holders.total(), "a page is lost or held twice"
        blank = {page for page, flag in enumerate(self._blank) if flag}
        assert len(blank) == self._num_blank
        assert not blank & holders.keys()
        assert len(blank) + len(holders) + self.num_idle == self.num_pages - 1
        self._index.check_integrity(holders)

    def _give_up(self, page: int) -> None:
        self._blank[page] = 1
        self._num_blank += 1

    def _mark(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._blank[page]
            self._blank[page] = 0
            self._num_blank -= 1
            self._holders[page] = 1

    def _following(self, after: int, count: int) -> list[int]:
        """Blank pages right behind `after`, `count` at most."""
        end = after + 1
        while end <= after + count and end < self.num_pages and self._blank[end]:
            end += 1
        return list(range(after + 1, end))

    def _side_by_side(self, count: int) -> list[int]:
        """The first run of `count` blank pages; the lowest blank pages where there is no run."""
        start = self._blank.find(_BLANK * count)
        if start >= 0:
            return list(range(start, start + count))
        pages: list[int] = []
        for _ in range(count):
            pages.append(self._blank.find(_BLANK, pages[-1] + 1 if pages else 0))
        return pages

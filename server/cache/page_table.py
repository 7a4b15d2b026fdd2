"""Pages of one (sequence, model)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from server.cache.page_pool import PagePool
from server.cache.prefix_keys import PrefixKeys


class PageTable:
    """Grows with what the model has consumed; token i lies in pages[i // page_size].

    With `keys`, full pages of verified tokens are published for others, and pages that others
    published are found instead of computed. Published pages are only ever read.
    """

    def __init__(self, pool: PagePool, keys: PrefixKeys | None = None) -> None:
        self._pool = pool
        self._keys = keys
        self._num_published = 0
        self.pages: list[int] = []

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self._pool.page_size

    def num_missing(self, num_tokens: int) -> int:
        """Pages to take before `num_tokens` tokens fit."""
        return max(0, self._pool.pages_for(num_tokens) - len(self.pages))

    def grow(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens. Raises IndexError when the pool is empty."""
        if missing := self.num_missing(num_tokens):
            self.pages.extend(self._pool.take(missing, self.pages[-1] if self.pages else 0))

    def adopt(self, token_ids: Sequence[int], num_seen: int, limit: int) -> int:
        """Put published pages where the tokens from `num_seen` on would go.

        Args:
            token_ids: of the sequence; verified at least up to `limit`.
            num_seen: tokens that the model has consumed.
            limit: pages beyond so many tokens are not looked for.

        Returns:
            Tokens that now count as consumed, at least `num_seen`.
        """
        for index, key in self._full_pages(token_ids, num_seen, limit):
            page = self._pool.find(key)
            if page is None:
                break
            self._pool.share(page)
            if index < len(self.pages):
                self._pool.give_back(self.pages[index : index + 1])
                self.pages[index] = page
            else:
                self.pages.append(page)
            num_seen = (index + 1) * self.page_size
            # Not again by this table: it may have been withdrawn by then.
            self._num_published = index + 1
        return num_seen

    def publish(self, token_ids: Sequence[int], num_tokens: int) -> None:
        """Let others find the full pages of the first `num_tokens` tokens, which are verified."""
        if self._keys is None:
            return
        num_full = num_tokens // self.page_size
        for index in range(self._num_published, num_full):
            self._pool.publish(self.pages[index], self._keys.key(token_ids, index))
        self._num_published = max(self._num_published, num_full)

    def keys_between(self, token_ids: Sequence[int], num_seen: int, end: int) -> list[bytes]:
        """Keys of the pages that tokens [num_seen, end), verified, fill; none without a cache."""
        return [key for _, key in self._full_pages(token_ids, num_seen, end)]

    def withdraw(self) -> None:
        """Let nobody find these pages any more, not even those that others published."""
        self._pool.withdraw(self.pages)

    def release(self) -> None:
        """Give every page back, the last one first: a prefix outlives what follows it."""
        self._pool.give_back(reversed(self.pages))
        self.pages.clear()
        self._num_published = 0

    def _full_pages(
        self, token_ids: Sequence[int], num_seen: int, end: int
    ) -> Iterator[tuple[int, bytes]]:
        """(index, key) of the pages that are full at `end` but not at `num_seen`."""
        if self._keys is not None:
            size = self.page_size
            for index in range(num_seen // size, end // size):
                yield index, self._keys.key(token_ids, index)

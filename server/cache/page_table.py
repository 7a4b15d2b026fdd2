"""Pages of one (sequence, model)."""

from __future__ import annotations

from server.cache.page_pool import PagePool


class PageTable:
    """Grows with what the model has consumed; token i lies in pages[i // page_size]."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.pages: list[int] = []

    def num_missing(self, num_tokens: int) -> int:
        """Pages to take before `num_tokens` tokens fit."""
        return max(0, self._pool.pages_for(num_tokens) - len(self.pages))

    def grow(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens. Raises IndexError when the pool is empty."""
        if missing := self.num_missing(num_tokens):
            self.pages.extend(self._pool.take(missing))

    def release(self) -> None:
        """Give every page back."""
        self._pool.give_back(self.pages)
        self.pages.clear()

"""Free pages of one model's KV memory: bookkeeping only, no tensors."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Hands out page numbers 1 .. num_pages - 1.

    Page 0 is never handed out: padding rows of static-shape forwards write there.
    Lowest numbers first, so that the pages of a sequence that grows alone lie side by side.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """`num_pages` counts page 0; `page_size` is in tokens."""
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """Raises IndexError when fewer than `count` pages are free; the caller asks first."""
        if count > len(self._free):
            raise IndexError(f"{count} pages wanted, {len(self._free)} free")
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        taken.reverse()
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        self._free.extend(sorted(pages, reverse=True))

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless free and `held` pages are each page exactly once."""
        everything = sorted([*self._free, *held])
        assert everything == list(range(1, self.num_pages)), "a page is lost or held twice"

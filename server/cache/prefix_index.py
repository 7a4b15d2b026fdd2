"""Which pages hold the keys and values of which prefixes; bookkeeping only, no tensors."""

from __future__ import annotations

from collections.abc import Iterable


class PrefixIndex:
    """Two-way map of keys and pages, and the order in which idle pages are given up.

    A page is idle while no sequence holds it: it keeps its content until its memory is needed,
    least recently used first.
    """

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # in the order of their last use

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, key: bytes) -> int | None:
        """The page that holds `key`."""
        return self._pages.get(key)

    def add(self, key: bytes, page: int) -> None:
        """Let others find a held page; where `key` has a page already, that one stays."""
        if key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key

    def retire(self, page: int) -> bool:
        """Nobody holds `page` any more; False if it has no key, so that it is not kept."""
        if page not in self._keys:
            return False
        self._idle[page] = None
        return True

    def revive(self, page: int) -> None:
        """Somebody holds an idle page again."""
        del self._idle[page]

    def forget(self, page: int) -> None:
        """Let a held page be found no more, if it could be."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._pages[key]

    def evict(self) -> int:
        """Forget the idle page that nobody has used for longest."""
        page = next(iter(self._idle))
        del self._idle[page]
        del self._pages[self._keys.pop(page)]
        return page

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless every known page is either held or idle."""
        assert {page: key for key, page in self._pages.items()} == self._keys
        assert self._keys.keys() - set(held) == self._idle.keys(), "a cached page is lost"

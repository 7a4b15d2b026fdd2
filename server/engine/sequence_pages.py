"""The pages that each sequence holds of every model, and the prefixes that it finds there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Row

from server.cache.page_pool import PagePool
from server.cache.page_table import PageTable
from server.cache.prefix_keys import PrefixKeys
from server.core.sequence import Sequence


class SequencePages:
    """Page tables of sequences, and what the prefix cache spared them since that was last taken."""

    def __init__(self, pools: Row[PagePool], prefix_cache: bool) -> None:
        """`pools` [num_models]; with `prefix_cache` sequences find what others have published."""
        self._pools = pools
        self._prefix_cache = prefix_cache
        self._tables: dict[str, tuple[PageTable, ...]] = {}
        self._num_cached = [0] * len(pools)
        # For whom there were too few pages, and how many of each model were free then.
        self._shortage: tuple[Sequence, tuple[int, ...]] | None = None

    def add(self, sequence: Sequence) -> None:
        """Let it hold pages; none at first."""
        params = sequence.params
        keys: dict[int, PrefixKeys] = {}
        # What is found has no scores: a prompt whose every position is to be scored is computed.
        if self._prefix_cache and params.prefix_cache and params.prompt_logprobs is None:
            sizes = {pool.page_size for pool in self._pools}
            keys = {size: PrefixKeys(size, params.cache_salt) for size in sizes}
        self._tables[sequence.id] = tuple(
            PageTable(pool, keys.get(pool.page_size)) for pool in self._pools
        )

    def remove(self, sequence: Sequence) -> None:
        """Forget one that holds no pages."""
        del self._tables[sequence.id]

    def table(self, sequence: Sequence, model: int) -> PageTable:
        """Of one sequence in one model."""
        return self._tables[sequence.id][model]

    def num_fitting(self, num_tokens: int) -> int:
        """Sequences of `num_tokens` tokens that the free pages of all models hold."""
        return min(pool.num_free // pool.pages_for(num_tokens) for pool in self._pools)

    def lacks(self, sequence: Sequence, model: int, num_tokens: int) -> bool:
        """Are too few pages free for it to hold `num_tokens` tokens?"""
        table = self._tables[sequence.id][model]
        return table.num_missing(num_tokens) > self._pools[model].num_free

    def reserve(self, sequence: Sequence, models: Iterable[int]) -> bool:
        """Give it pages of every model, or none at all; False where they are too few.

        `models` look for its prefix. Who was refused is refused until more pages are free: looking
        for a long prefix takes long.
        """
        if self._is_still_short(sequence):
            return False
        before = list(sequence.num_seen)
        for model in models:
            self.adopt(sequence, model)
        # The page of the next token included: nobody is admitted only to be preempted.
        num_tokens = min(len(sequence) + 1, sequence.limit)
        tables = self._tables[sequence.id]
        if not any(self.lacks(sequence, model, num_tokens) for model in range(len(tables))):
            for table in tables:
                table.grow(num_tokens)
            self._shortage = None
            return True
        self.free(sequence)
        self._shortage = sequence, tuple(pool.num_free for pool in self._pools)
        for model, num_seen in enumerate(before):
            self._count_cached(sequence, model, num_seen - sequence.num_seen[model])
        sequence.num_seen = before
        return False

    def adopt(self, sequence: Sequence, model: int) -> None:
        """Count as consumed what others have published."""
        # The token before the first open position has to be fed: only then that one is scored.
        limit = sequence.first_open - 1
        before = sequence.num_seen[model]
        table = self._tables[sequence.id][model]
        sequence.num_seen[model] = table.adopt(sequence.token_ids, before, limit)
        self._count_cached(sequence, model, sequence.num_seen[model] - before)

    def publish(self, sequence: Sequence) -> None:
        """Let others find the full pages of what is verified."""
        for table, num_seen in zip(self._tables[sequence.id], sequence.num_seen, strict=True):
            table.publish(sequence.token_ids, min(num_seen, sequence.num_verified))

    def withdraw(self, sequence: Sequence) -> None:
        """Take its pages out of the prefix cache: they may hold what made its scores invalid."""
        for table in self._tables[sequence.id]:
            table.withdraw()

    def free(self, sequence: Sequence) -> None:
        """Give all its pages back."""
        for table in self._tables[sequence.id]:
            table.release()

    def take_num_cached(self) -> tuple[int, ...]:
        """[num_models] tokens whose KV was found since this was last asked."""
        taken, self._num_cached = tuple(self._num_cached), [0] * len(self._pools)
        return taken

    def return_num_cached(self, num_cached: Row[int]) -> None:
        """What was taken was told to nobody."""
        for model, count in enumerate(num_cached):
            self._num_cached[model] += count

    def num_idle(self) -> tuple[int, ...]:
        """[num_models] pages that nobody holds but that keep a prefix."""
        return tuple(pool.num_idle for pool in self._pools)

    def num_used(self) -> tuple[int, ...]:
        """[num_models] pages that sequences hold."""
        return tuple(pool.num_used for pool in self._pools)

    def check_integrity(self, ids: Iterable[str], without: Iterable[Sequence]) -> None:
        """Raise AssertionError unless every page is held exactly once.

        `ids` are those of all sequences; those `without` pages hold none.
        """
        assert set(self._tables) == set(ids)
        for k, pool in enumerate(self._pools):
            pool.check_integrity(
                page for tables in self._tables.values() for page in tables[k].pages
            )
        for sequence in without:
            assert not any(table.pages for table in self._tables[sequence.id])

    def _is_still_short(self, sequence: Sequence) -> bool:
        """It did not fit, and no model has more pages free than then."""
        if self._shortage is None or self._shortage[0] is not sequence:
            return False
        before = self._shortage[1]
        return all(pool.num_free <= n for pool, n in zip(self._pools, before, strict=True))

    def _count_cached(self, sequence: Sequence, model: int, num_tokens: int) -> None:
        self._num_cached[model] += num_tokens
        if sequence.stats.num_preemptions == 0:
            sequence.stats.cached[model] += num_tokens

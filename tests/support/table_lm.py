"""Language models small enough to enumerate, behind the real KV bookkeeping.

A `TableLM` gives every prefix its own random distribution. A `TableRunner` keeps the tokens it was
fed in pages, as a real model keeps their KV, and scores whatever the page table says the prefix
is: a wrong page, a stale row or a wrong count changes its answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from server.cache.drafted import known_ids
from server.runner.base import Batch


class TableLM:
    """Random logits for every prefix; a pure function of (seed, prefix)."""

    def __init__(
        self, seed: int, vocab_size: int = 3, spread: float = 1.0, zero_share: float = 0.0
    ) -> None:
        """`zero_share` of the tokens of each distribution have probability zero."""
        self.vocab_size = vocab_size
        self._seed = seed
        self._spread = spread
        self._zero_share = zero_share
        self._rows: dict[tuple[int, ...], np.ndarray] = {}

    def logits(self, prefix: Sequence[int]) -> np.ndarray:
        """float64 [vocab_size], exact in float32."""
        key = tuple(prefix)
        if key not in self._rows:
            digest = hashlib.blake2b(repr((self._seed, key)).encode(), digest_size=8).digest()
            rng = np.random.default_rng(int.from_bytes(digest, "little"))
            row = rng.normal(size=self.vocab_size) * self._spread
            zeros = rng.random(self.vocab_size) < self._zero_share
            zeros[rng.integers(self.vocab_size)] = False
            row[zeros] = -np.inf
            self._rows[key] = row.astype(np.float32).astype(np.float64)
        return self._rows[key]


class TableRunner:
    """A ModelRunner over a TableLM."""

    device = torch.device("cpu")
    dtype = torch.float32
    gathers = True

    def __init__(
        self,
        lm: TableLM,
        name: str = "table",
        num_pages: int = 4096,
        page_size: int = 4,
        max_length: int = 64,
    ) -> None:
        self.name = name
        self.vocab_size = lm.vocab_size
        self.max_length = max_length
        self.page_size = page_size
        self.num_pages = num_pages
        self.num_forwards = 0
        self.deferred: TableShortlist | None = None
        self._lm = lm
        self._pages = np.full((num_pages, page_size), -1)

    def forward(self, batch: Batch) -> Tensor:
        assert batch.spans, "a forward over nothing"
        self.num_forwards += 1
        rows = []
        for span in batch.spans:
            assert 0 not in span.pages
            token_ids = known_ids(torch.tensor(span.token_ids), batch.drafted).tolist()
            for offset, token in enumerate(token_ids):
                page, place = divmod(span.num_past + offset, self.page_size)
                self._pages[span.pages[page], place] = token
            length = span.num_past + len(span.token_ids)
            seen = self._pages[list(span.pages)].reshape(-1)[:length].tolist()
            assert -1 not in seen
            kept = range(length - span.num_kept + 1, length + 1)
            rows += [self._lm.logits(seen[:end]) for end in kept]
        return torch.tensor(np.array(rows), dtype=torch.float32).view(-1, self.vocab_size)


class TableShortlist:
    """DeferredScores of a TableRunner: a state is its row of logits, backwards.

    Attributes:
        num_deferred: forwards that left states.
        num_scored: rows whose full scores were asked for afterwards.
    """

    def __init__(self, runner: TableRunner, ids: Sequence[int]) -> None:
        self.state_size = runner.vocab_size
        self.num_deferred = 0
        self.num_scored = 0
        self._runner = runner
        self._ids = list(ids)
        self.shortlist = torch.tensor(self._ids)

    def states(self, batch: Batch) -> Tensor:
        self.num_deferred += 1
        return self._runner.forward(batch).flip(-1)

    def scores(self, states: Tensor) -> Tensor:
        self.num_scored += len(states)
        return states.flip(-1)

    def shortlist_scores(self, states: Tensor) -> Tensor:
        return states.flip(-1)[:, self._ids]


class DigitDecoder:
    """Token i is the text of i and a space; ids from 10 on are letters."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(f"{i} " if i < 10 else chr(ord("a") + i - 10) for i in ids)

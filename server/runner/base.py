"""The boundary between the engine and a model: a batch of spans in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Span(NamedTuple):
    """Consecutive tokens of one sequence that a model consumes in one forward.

    Attributes:
        pages: the sequence's page table in this model; covers num_past + len(token_ids) tokens.
            Token i lies in pages[i // page_size] at offset i % page_size.
        num_past: tokens consumed before; their KV is in the pages.
        token_ids: the tokens to feed, at least one; see `Batch.drafted` for unread ones.
        num_kept: logits are wanted after each of the last `num_kept` fed tokens.
    """

    pages: Sequence[int]
    num_past: int
    token_ids: Sequence[int]
    num_kept: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed forward of one model over many sequences.

    Attributes:
        drafted: int64, on the model's device: the ids that unread tokens of the spans stand for
            (`core.unread`); None where the host knows all of them.
    """

    spans: tuple[Span, ...]
    drafted: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(span.token_ids) for span in self.spans)

    @property
    def num_kept(self) -> int:
        return sum(span.num_kept for span in self.spans)


class DeferredScores(Protocol):
    """A runner's forward in two parts, for a model that may propose from a shortlist."""

    @property
    def state_size(self) -> int:
        """Width of a state."""
        ...

    def states(self, batch: Batch) -> Tensor:
        """As ModelRunner.forward, but states [batch.num_kept, state_size] in place of logits."""
        ...

    def scores(self, states: Tensor) -> Tensor:
        """States [n, state_size] -> logits [n, vocab_size], those that `forward` returns."""
        ...

    @property
    def shortlist(self) -> Tensor:
        """Ids of its tokens, int64 [m], ascending."""
        ...

    def shortlist_scores(self, states: Tensor) -> Tensor:
        """States [n, state_size] -> float32 [n, m]: logits of the shortlist."""
        ...


class ModelRunner(Protocol):
    """One model and its KV memory. Everything that touches the model happens in `forward`."""

    @property
    def name(self) -> str:
        """Of the configured member."""
        ...

    @property
    def vocab_size(self) -> int:
        """Of the shared vocabulary; logits are cut to it."""
        ...

    @property
    def max_length(self) -> int:
        """Longest sequence the model can consume, in tokens."""
        ...

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        ...

    @property
    def num_pages(self) -> int:
        """Pages of its KV memory, the never-used page 0 included."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the logits."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        ...

    @property
    def gathers(self) -> bool:
        """Does it copy keys together to attend to them, where others read them where they lie?

        Then what several texts begin with may be attended once for all of them (`grouping`).
        """
        ...

    @property
    def deferred(self) -> DeferredScores | None:
        """None: the model has no shortlist."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """Consume the spans: write their KV into the pages and return logits.

        Returns:
            [batch.num_kept, vocab_size]: for each span in order, the scores that follow its last
            `num_kept` tokens. KV of a position may be written again at any time; only the spans'
            num_past says what is valid.
        """
        ...

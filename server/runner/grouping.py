"""Which spans of a batch attention takes together.

Only spans with equally many tokens ever are. Where keys are read where they lie, all of those are
taken together. Where they are gathered (see `ModelRunner.gathers`), each text of some length is
better read alone, as a view of its pages, unless texts begin with the same pages: then what they
share is attended once for all of them, and what follows is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, takewhile
from typing import NamedTuple

from server.runner.base import Span

# Spans of more tokens are attended one by one: they fill the machine alone.
MAX_GROUPED_TOKENS = 16
# Measured on CPU: beyond this length, gathering into one tensor costs more than a call each.
MAX_GATHERED_LENGTH = 256
# Tokens in common from which attending them once for all pays for putting two parts together.
MIN_SHARED_LENGTH = 128


class Together(NamedTuple):
    """Spans, with equally many tokens, that one attention call takes.

    Attributes:
        spans: side by side in the packed batch.
        num_shared: pages that all begin with, to be attended once for all; 0: none.
    """

    spans: list[Span]
    num_shared: int


def packing_order(spans: Sequence[Span], page_size: int, gathers: bool) -> list[int]:
    """Indices of `spans`, such that those that may be taken together lie side by side."""

    def place(index: int) -> tuple[int, ...]:
        span = spans[index]
        if not gathers:
            return (len(span.token_ids),)
        # Of those that begin alike it is the longest that may have to be left out.
        return len(span.token_ids), _prefix_page(span, page_size), span.num_past

    return sorted(range(len(spans)), key=place)


def taken_together(spans: Sequence[Span], page_size: int, gathers: bool) -> list[Together]:
    """All of `spans`, one after the other.

    Args:
        spans: of one batch, in their `packing_order`.
        page_size: in tokens.
        gathers: see ModelRunner.
    """
    found: list[Together] = []
    for num_tokens, alike in groupby(spans, key=lambda span: len(span.token_ids)):
        found += _cut(list(alike), num_tokens, page_size, gathers)
    return found


def _cut(spans: list[Span], num_tokens: int, page_size: int, gathers: bool) -> list[Together]:
    """Of spans of `num_tokens` each."""
    if num_tokens > MAX_GROUPED_TOKENS:
        return [Together([span], 0) for span in spans]
    if not gathers or max(span.num_past for span in spans) + num_tokens <= MAX_GATHERED_LENGTH:
        return [Together(spans, 0)]
    parts: list[Together] = []
    for prefix_page, alike in groupby(spans, key=lambda span: _prefix_page(span, page_size)):
        members = list(alike)
        sharing = _worth_sharing(members, num_tokens, page_size) if prefix_page else []
        if sharing:
            parts.append(Together(sharing, _num_shared(sharing, page_size)))
        parts += [Together([span], 0) for span in members[len(sharing) :]]
    return parts


def _worth_sharing(spans: list[Span], num_tokens: int, page_size: int) -> list[Span]:
    """The first of `spans`, shortest first, whose common beginning is better attended once."""
    shared = _num_shared(spans, page_size) * page_size
    limit = shared + MAX_GATHERED_LENGTH - num_tokens
    sharing = list(takewhile(lambda span: span.num_past <= limit, spans))
    if len(sharing) < 2:
        return []
    own = sharing[-1].num_past + num_tokens - shared
    # Keys not read again, against keys that are copied, the shorter texts' padding included.
    return sharing if (len(sharing) - 1) * shared >= len(sharing) * own else []


def _prefix_page(span: Span, page_size: int) -> int:
    """The page that ends the first MIN_SHARED_LENGTH tokens; 0 where fewer have been consumed.

    Spans with the same one begin with the same tokens up to there: a page that two sequences hold
    follows the same tokens in both, if not always the same pages.
    """
    count = max(1, MIN_SHARED_LENGTH // page_size)
    return span.pages[count - 1] if span.num_past >= count * page_size else 0


def _num_shared(spans: list[Span], page_size: int) -> int:
    """Pages that all of them begin with, full of tokens that all have consumed."""
    limit = min(span.num_past for span in spans) // page_size
    columns = zip(*(span.pages[:limit] for span in spans), strict=True)
    same = takewhile(lambda pages: len(set(pages)) == 1, columns)
    return sum(1 for _ in same)

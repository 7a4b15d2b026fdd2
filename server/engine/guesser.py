"""Prompt lookup: proposals that no model makes, of what has followed the last tokens before."""

from __future__ import annotations

from collections.abc import Iterable

from server.core.sequence import Sequence
from server.core.stats import StepStats
from server.decoding.strategies import Strategies

# Where no costs are known, what is looked up must have been right this often of late.
_MIN_RATE = 0.5


class Guesser:
    """Asks the lookups of sequences, and proposes as much of what they find as is worth it."""

    def __init__(self, strategies: Strategies) -> None:
        self._strategies = strategies

    def look_up(self, sequences: Iterable[Sequence], stats: StepStats) -> None:
        """Propose what has followed before, once for each number of verified tokens."""
        for sequence in sequences:
            lookup = sequence.lookup
            if lookup is None or not _may_look_up(sequence):
                continue
            found = lookup.guess(sequence.token_ids)[: sequence.limit - len(sequence)]
            count = self._length(sequence, lookup.rate, len(found))
            proposed = _allowed(sequence, found[:count])
            if proposed:
                sequence.look_up(proposed)
                stats.num_looked_up += len(proposed)
            stats.lookups.append("proposed" if proposed else "withheld" if found else "missed")

    def _length(self, sequence: Sequence, rate: float, num_found: int) -> int:
        chooser = self._strategies.chooser
        if num_found and chooser is not None and sequence.decoding.is_auto:
            return chooser.lookup_length(sequence, rate, num_found)
        return num_found if rate >= _MIN_RATE else 0


def _may_look_up(sequence: Sequence) -> bool:
    """Tokens were verified since it was last asked, and none is pending."""
    return (
        sequence.schedule.lookup is not None
        and sequence.num_pending == 0
        and sequence.num_generated > 0
        and not sequence.is_resuming
        and not sequence.is_full
        and sequence.lookup is not None
        and sequence.lookup.is_due(len(sequence))
    )


def _allowed(sequence: Sequence, token_ids: list[int]) -> list[int]:
    """Those at the front that the sequence's grammar allows, if it has one.

    No other may be pending, for the grammar goes on from what is.
    """
    matcher = sequence.matcher
    if matcher is None:
        return token_ids
    generated = sequence.token_ids[sequence.num_prompt :]
    for count, token_id in enumerate(token_ids):
        mask = matcher.mask([*generated, *token_ids[:count]])
        if not mask[token_id // 8] >> token_id % 8 & 1:
            return token_ids[:count]
    return token_ids

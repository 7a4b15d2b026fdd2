"""What is known of a pending token beside its id."""

from __future__ import annotations

from typing import NamedTuple


class Proposal(NamedTuple):
    """Where a pending token came from.

    Attributes:
        proposer: the model whose own distribution it was drawn from; LOOKUP if it was looked up.
        from_shortlist: that distribution was over the model's shortlist.
        is_bonus: the model had just verified or scored proposals of others.
    """

    proposer: int
    from_shortlist: bool = False
    is_bonus: bool = False

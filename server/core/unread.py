"""Stand-ins for token ids that a device knows and the host does not, yet.

Where drafting runs ahead, a proposed token is fed to the next forward without the host having seen
it: what stands for it in a list of token ids says which row of a tensor on the device holds it.
"""

from __future__ import annotations

_FIRST = -2  # -1 is what sampling gives where there is nothing to sample from


def unread(row: int) -> int:
    """What stands for the id in `row`, counted from 0."""
    return _FIRST - row


def is_unread(token_id: int) -> bool:
    """Does it stand for an id that the host does not know?"""
    return token_id <= _FIRST

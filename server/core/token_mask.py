"""Sets of tokens as bits, as grammars give them: token i is bit i % 8 of byte i // 8.

Tokens behind the end of a mask are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence as Row

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint8]


def packed(token_ids: Row[int]) -> Bits:
    """The mask of these tokens, of which there is one at least."""
    tokens = np.array(token_ids, np.int64)
    mask = np.zeros(tokens.max() + 1, np.uint8)
    mask[tokens] = 1
    return np.packbits(mask, bitorder="little")


def both(one: Bits, other: Bits) -> Bits:
    """Tokens that are in both masks."""
    size = min(len(one), len(other))
    return one[:size] & other[:size]


def stacked(masks: Row[Bits], num_bytes: int) -> Bits:
    """Of masks none of which is longer, [len(masks), num_bytes]."""
    rows = np.zeros((len(masks), num_bytes), np.uint8)
    for row, mask in zip(rows, masks, strict=True):
        row[: len(mask)] = mask
    return rows


def are_in(token_ids: NDArray[np.int64], mask: Bits) -> NDArray[np.bool_]:
    """Which of some tokens, none of which lies behind the mask's end, are in it."""
    return (mask[token_ids // 8] >> (token_ids % 8) & 1).astype(bool)

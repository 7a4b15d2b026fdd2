"""What requests change of single scores, as the kernel that decides tokens takes it.

Penalties, biases, lists of tokens and words, `min_tokens` and grammars: those of `decoding.warp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Row
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from server.core.sequence import Sequence
from server.core.token_mask import Bits, are_in, stacked
from server.decoding.score_changes import (
    Changes,
    Ids,
    Reals,
    added,
    bad_tokens,
    ending_tokens,
    forbidden,
    is_early,
    joined,
    penalties,
)
from server.decoding.warp import Place, masks_of


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Of R rows; see `simd.decisions.decider` and `simd.adjustment`.

    Attributes:
        starts: [R + 1], of the rows' changes.
        changed: [N], tokens.
        changes: [N, 2].
        masks: [R], addresses of rows of `bits`, or 0.
        bits: [M, whole blocks of the vocabulary, by eight].
    """

    starts: Ids
    changed: Ids
    changes: Reals
    masks: Ids
    bits: Bits

    def allows(self, row: int, ids: Ids) -> NDArray[np.bool_] | None:
        """Which tokens of `ids` a row leaves possible; None: all of them."""
        changes = slice(self.starts[row], self.starts[row + 1])
        banned = self.changed[changes][self.changes[changes, 1] == -np.inf]
        mask = self.masks[row]
        if not mask and not len(banned):
            return None
        allowed = ~np.isin(ids, banned)
        if mask:
            number = (mask - self.bits.ctypes.data) // self.bits.shape[1]
            allowed &= are_in(ids, self.bits[number])
        return allowed


@dataclass(frozen=True, slots=True)
class _Lasting:
    """What one sequence asks for at each of its places.

    Attributes:
        biases: of scores.
        ends: what is done to the tokens that would end the text too early.
    """

    biases: Changes
    ends: Changes


class Adjuster:
    """Makes adjustments for one vocabulary."""

    def __init__(self, eos_token_ids: frozenset[int], num_bits: int) -> None:
        """`num_bits` of a mask: the vocabulary, up to whole blocks."""
        self._eos = eos_token_ids
        self._num_bytes = num_bits // 8
        # Requests may list hundreds of tokens: they are read once, not at each place.
        self._lasting: WeakKeyDictionary[Sequence, _Lasting] = WeakKeyDictionary()

    def takes(self, sequence: Sequence) -> bool:
        """Can it make all that `sequence` asks for?

        Where a grammar leaves nothing but an end of text that comes too early, that end is allowed,
        and whether it is so depends on scores.
        """
        return sequence.matcher is None or not sequence.params.min_tokens

    def adjustments(self, places: Row[Place], inverse_temperatures: Reals) -> Adjustments | None:
        """Of places, whose scores are scaled by [R]; None where nothing is changed."""
        if not any(s.params.adjusts_scores or s.matcher is not None for s, _ in places):
            return None
        rows = [joined(self._changes(*place)) for place in places]
        counts = [len(tokens) for tokens, _ in rows]
        changed, changes = joined(rows)
        changes = changes.copy()
        changes[:, 1] *= np.repeat(inverse_temperatures, counts)
        masks, bits = self._masks(places)
        return Adjustments(
            starts=np.fromiter(accumulate(counts, initial=0), np.int64, len(counts) + 1),
            changed=changed,
            changes=changes,
            masks=masks,
            bits=bits,
        )

    def _changes(self, sequence: Sequence, position: int) -> Iterable[Changes]:
        """In the order in which they are made."""
        lasting = self._of(sequence)
        yield penalties(sequence, position)
        yield lasting.biases
        yield forbidden(bad_tokens(sequence, position))
        if is_early(sequence, position):
            yield lasting.ends

    def _masks(self, places: Row[Place]) -> tuple[Ids, Bits]:
        """Addresses [R] of masks, or 0, and these."""
        found = masks_of(places)
        bits = stacked([*found.values()], self._num_bytes)
        addresses = np.zeros(len(places), np.int64)
        addresses[[*found]] = bits.ctypes.data + np.arange(len(found)) * self._num_bytes
        return addresses, bits

    def _of(self, sequence: Sequence) -> _Lasting:
        lasting = self._lasting.get(sequence)
        if lasting is None:
            lasting = self._lasting[sequence] = self._made(sequence)
        return lasting

    def _made(self, sequence: Sequence) -> _Lasting:
        ends = sorted(ending_tokens(sequence.params, self._eos))
        return _Lasting(
            biases=added(sequence.params.logit_bias),
            ends=forbidden(ends),
        )
